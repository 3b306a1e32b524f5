"""Memory: how much of it a process may still use, and what a model does with it.

Weights stay in the file and are mapped, so a model that is larger than memory runs too: its bytes come from the disk
again for every token. Large ones move to huge pages where there is room.

    checkpoint = in_huge_pages(checkpoint, available_bytes())
    available_bytes()                                   # 12_345_678_901
    print(outlook(config, token_bytes(checkpoint), position_bytes(config), available_bytes()))
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from onebit.checkpoint import Checkpoint
from onebit.config import ModelConfig
from onebit.packing import UNIT_BYTES, PackedTensor, UInt8

# Python, its libraries and the buffers of a forward pass of 512 tokens, for the largest models we know.
PROCESS_BYTES = 64_000_000

# Of a solid-state disk; a guess, named as one wherever it is used.
DISK_BYTES_PER_S = 1_000_000_000

# Models of so many bytes are moved to huge pages: the pages of a smaller one are few.
HUGE_FROM = 128_000_000
HUGE_PAGE = 2 << 20
# Copied at a time by one thread.
COPY_BYTES = 8 << 20

# Number formats of the cache: the reference, then 8 bits as codes with a float32 scale for each key and value, then
# 8 bits as floats (e4m3).
KV_FORMATS = ("bf16", "int8", "fp8")


def position_bytes(config: ModelConfig, kv_cache: str = "bf16") -> int:
    """Bytes that one position of a text takes in the cache: a key and a value in every layer and key-value head."""
    width = config.d_head
    # int8 vectors are padded to whole lanes.
    vector = {"bf16": 2 * width, "int8": -(-width // 16) * 16 + 4, "fp8": width}[kv_cache]
    return 2 * config.n_layers * config.n_kv_heads * vector


def in_huge_pages(checkpoint: Checkpoint, available: int | None, root: Path = Path("/")) -> Checkpoint:
    """Copy mapped weights into memory of huge pages, and let go of the pages of the file.

    A step touches every page of the weights. How fast the system finds them depends on how the file came to lie in its
    cache; huge pages are few, and found at once.

    Args:
        checkpoint: a packed model.
        available: bytes of memory for the process, or None where that is not known.
        root: folder that holds proc/, of Linux.

    Returns:
        The same model, as it was where it is small or not mapped, where memory would not hold it twice, or where the
        system has not enough huge pages free: it would have to make them, which takes seconds.
    """
    mapped = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if isinstance(tensor, PackedTensor) and _mapping(tensor.data) is not None
    }
    size = sum(tensor.data.nbytes for tensor in mapped.values())
    if size < HUGE_FROM or available is None or available < 2 * size or free_huge_bytes(root) < size:
        return checkpoint
    # Private: shared memory has huge pages by another switch of the system.
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        # A system built without them.
        return checkpoint
    room = np.frombuffer(memory, np.uint8)
    at = -room.ctypes.data % HUGE_PAGE
    tensors = dict(checkpoint.tensors)
    copies: list[tuple[UInt8, UInt8]] = []
    for name, tensor in mapped.items():
        # Data of every tensor is a whole number of units, so all stay aligned.
        data = room[at : at + tensor.data.nbytes].reshape(tensor.data.shape)
        at += data.nbytes
        tensors[name] = tensor._replace(data=data)
        pairs = (array.reshape(-1, UNIT_BYTES) for array in (data, tensor.data))
        copies += zip(
            *(np.array_split(array, -(-array.nbytes // COPY_BYTES)) for array in pairs), strict=True
        )
    # The system clears each page that is touched first, which takes longer than the copy: on every core at once.
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda pair: _move(*pair), copies))
    for mapping in {id(m): m for m in (_mapping(tensor.data) for tensor in mapped.values())}.values():
        assert mapping is not None
        mapping.madvise(mmap.MADV_DONTNEED)
    return replace(checkpoint, tensors=tensors)


def _move(to: UInt8, source: UInt8) -> None:
    """Copy, and let the pages of the source leave the process; they come back when they are touched."""
    np.copyto(to, source)
    mapping = _mapping(source)
    assert mapping is not None
    begin = source.ctypes.data - np.frombuffer(mapping, np.uint8).ctypes.data
    first = begin // mmap.PAGESIZE * mmap.PAGESIZE
    mapping.madvise(mmap.MADV_DONTNEED, first, begin + source.nbytes - first)


def free_huge_bytes(root: Path) -> int:
    """Free memory in pieces of at least a huge page; 0 where the system does not tell, or has no huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return 0
    try:
        lines = (root / "proc/buddyinfo").read_text().splitlines()
        # "Node 0, zone Normal" and how many free pieces there are of 1, 2, 4, ... pages.
        counts = [[int(n) for n in line.split()[4:]] for line in lines]
    except (OSError, ValueError):
        return 0
    pieces = ((n, mmap.PAGESIZE << order) for zone in counts for order, n in enumerate(zone))
    return sum(n * size for n, size in pieces if size >= HUGE_PAGE)


def _mapping(array: UInt8) -> mmap.mmap | None:
    """The mapped file that an array is a view of, if it is one."""
    base: object = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    return base


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that this process may still fill before the system swaps or ends it; None where it does not tell.

    Pages of files, mapped models among them, count as available: the system takes them back when it needs to.

    Args:
        root: folder that holds proc/ and sys/, of Linux.
    """
    if sys.platform == "win32":
        return _windows_available()
    found = [_meminfo_available(root), _address_space_left(root), *_cgroups_available(root)]
    limits = [limit for limit in found if limit is not None]
    if limits:
        return min(limits)
    try:
        # macOS tells only how much there is.
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def outlook(config: ModelConfig, token_bytes: int, kv_bytes: int, available: int | None) -> str:
    """What happens when a model runs in the memory that there is, in words.

    Args:
        config: of the model.
        token_bytes: bytes of weights that every token reads.
        kv_bytes: bytes of keys and values of a position.
        available: bytes of memory for the process, or None where that is not known.
    """
    if available is None:
        return "the memory available here is not known"
    left = available - PROCESS_BYTES - token_bytes
    if left >= kv_bytes * config.max_seq_len:
        return "fits into memory with its whole context"
    if left >= kv_bytes:
        return f"fits into memory with {left // kv_bytes:,} of {config.max_seq_len:,} tokens of context"
    seconds = token_bytes / DISK_BYTES_PER_S
    return (
        f"larger than memory: it runs, but each token reads up to {token_bytes / 1e9:.1f} GB from the disk, "
        f"about {seconds:.1f} s at an assumed {DISK_BYTES_PER_S / 1e9:.0f} GB/s"
    )


def _meminfo_available(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def _address_space_left(root: Path) -> int | None:
    """What `ulimit -v` leaves this process, if it limits it."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        used = int((root / "proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    except (OSError, ValueError, IndexError):
        return None
    return max(limit - used, 0)


def cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups around this process that have a controller, of version 2 and of version 1.

    Args:
        root: folder that holds proc/ and sys/, of Linux.
        controller: as "memory" or "cpu".
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        # In a container the path may lead out of what is mounted; the limit is then that of the mount.
        inside = top / path.lstrip("/")
        yield from (folder for folder in (inside, *inside.parents) if folder.is_relative_to(top))


def _cgroups_available(root: Path) -> list[int]:
    """What the control groups around this process leave it."""
    version_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    version_2 = ("memory.max", "memory.current", "")
    kinds = (version_1, version_2)
    found = (_cgroup_left(folder, *kind) for folder in cgroups(root, "memory") for kind in kinds)
    return [left for left in found if left is not None]


def _cgroup_left(folder: Path, limit: str, usage: str, prefix: str) -> int | None:
    try:
        most, used = (int((folder / name).read_text()) for name in (limit, usage))
        stat = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
        # Pages of files are given up before the limit hurts.
        files = sum(int(stat.get(f"{prefix}{name}_file", 0)) for name in ("inactive", "active"))
        return max(most - used + files, 0)
    except (OSError, ValueError):
        # No limit reads "max", which is no number.
        return None


def _windows_available() -> int | None:
    # MEMORYSTATUSEX: two words of 32 bits, its own size in the first, then 64-bit counts; ullAvailPhys is the second.
    status = (ctypes.c_ulonglong * 8)(64)
    kernel32 = getattr(ctypes, "windll").kernel32  # noqa: B009, absent from the stubs of other systems
    return int(status[2]) if kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else None

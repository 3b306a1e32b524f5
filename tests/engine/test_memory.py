"""Exact: memory limits as the system states them, and what `onebit info` concludes."""

import mmap

import numpy as np
import pytest

import tiny
from onebit.checkpoint import quantize
from onebit.engine import memory
from onebit.engine.memory import PROCESS_BYTES, available_bytes, in_huge_pages, outlook
from onebit.formats import native
from onebit.packing import PackedTensor

GB = 10**9
MEMINFO = "MemTotal:       16000000 kB\nMemFree:          100000 kB\nMemAvailable:    8000000 kB\n"
STAT = "inactive_file 1000\nactive_file 200\ntotal_inactive_file 3000\ntotal_active_file 400\n"


def system(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def version_2(folder, most, used):
    return {f"{folder}/memory.max": most, f"{folder}/memory.current": used, f"{folder}/memory.stat": STAT}


def version_1(folder, most, used):
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    return {f"{folder}/{name}": text for name, text in zip(names, (most, used, STAT), strict=True)}


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"
CASES = {
    "no group": ({}, 8_192_000_000),
    "no limit": ({"proc/self/cgroup": "0::/a\n"} | version_2(f"{V2}/a", "max\n", "5\n"), 8_192_000_000),
    "limit": ({"proc/self/cgroup": "0::/a\n"} | version_2(f"{V2}/a", "9000\n", "5000\n"), 4000 + 1200),
    "limit above": (
        {"proc/self/cgroup": "0::/a/b\n"}
        | version_2(f"{V2}/a/b", "max\n", "5000\n")
        | version_2(f"{V2}/a", "7000\n", "5000\n"),
        2000 + 1200,
    ),
    "container": (
        {"proc/self/cgroup": "0::/not/mounted\n"} | version_2(V2, "9000\n", "9500\n"),
        700,
    ),
    "version 1": (
        {"proc/self/cgroup": "5:cpu:/a\n4:memory:/a\n"} | version_1(f"{V1}/a", "9000\n", "5000\n"),
        4000 + 3400,
    ),
    "larger than memory": (
        {"proc/self/cgroup": "4:memory:/\n"} | version_1(V1, "9223372036854771712\n", "5000\n"),
        8_192_000_000,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_narrowest_limit_counts(tmp_path, name):
    files, expected = CASES[name]
    assert available_bytes(system(tmp_path, {"proc/meminfo": MEMINFO} | files)) == expected


def test_a_limit_of_address_space_counts(tmp_path, monkeypatch):
    """As `ulimit -v` and `onebit bench --memory-limit` set it; statm counts pages."""
    resource = pytest.importorskip("resource")
    root = system(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/statm": "1000 5 5 5 0 5 0\n"})
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2**30, 2**30))
    assert available_bytes(root) == 2**30 - 1000 * mmap.PAGESIZE
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2000, 2000))
    assert available_bytes(root) == 0


def test_a_system_without_proc_tells_something_or_nothing(tmp_path):
    found = available_bytes(tmp_path)
    assert found is None or found > 2**28
    assert available_bytes() > 2**24


@pytest.mark.parametrize(
    ("available", "expected"),
    [
        (None, "the memory available here is not known"),
        (PROCESS_BYTES + 4 * GB + 192 * 1000, "fits into memory with its whole context"),
        (PROCESS_BYTES + 4 * GB + 192 * 1000 - 1, "fits into memory with 191 of 192 tokens of context"),
        (
            PROCESS_BYTES + 4 * GB,
            "larger than memory: it runs, but each token reads up to 4.0 GB from the disk, "
            "about 4.0 s at an assumed 1 GB/s",
        ),
    ],
)
def test_the_outlook_follows_from_the_sizes(available, expected):
    assert outlook(tiny.CONFIG, 4 * GB, 1000, available) == expected


@pytest.fixture
def mapped(tmp_path):
    native.write(quantize(tiny.master()), tmp_path / "tiny.onebit")
    return native.read(tmp_path / "tiny.onebit")


def free_pages(root, small, huge):
    """A system with so many free pieces of 4 KB and of 2 MB."""
    zone = f"Node 0, zone   Normal {small} 0 0 0 0 0 0 0 0 {huge} 0\n"
    return system(root, {"proc/buddyinfo": zone})


def test_weights_in_huge_pages_are_the_same(mapped, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "HUGE_FROM", 0)
    monkeypatch.setattr(memory, "COPY_BYTES", 640)
    moved = in_huge_pages(mapped, 10 * GB, free_pages(tmp_path, 0, 8))
    if not hasattr(memory.mmap, "MADV_HUGEPAGE"):
        assert moved is mapped
        return
    assert list(moved.tensors) == list(mapped.tensors) and moved.config == mapped.config
    for name, tensor in mapped.tensors.items():
        other = moved.tensors[name]
        if not isinstance(tensor, PackedTensor):
            assert other is tensor
            continue
        assert not np.shares_memory(other.data, tensor.data) and other.data.ctypes.data % 64 == 0
        assert np.array_equal(other.data, tensor.data) and other.scale is tensor.scale


def test_weights_stay_where_they_are(mapped, monkeypatch, tmp_path):
    free = free_pages(tmp_path / "free", 0, 8)
    assert in_huge_pages(mapped, 10 * GB, free) is mapped  # small
    monkeypatch.setattr(memory, "HUGE_FROM", 0)
    size = sum(t.data.nbytes for t in mapped.tensors.values() if isinstance(t, PackedTensor))
    assert in_huge_pages(mapped, 2 * size - 1, free) is mapped  # no room for both
    assert in_huge_pages(mapped, None, free) is mapped
    assert in_huge_pages(mapped, 10 * GB, free_pages(tmp_path / "torn", 10**6, 0)) is mapped
    assert in_huge_pages(mapped, 10 * GB, tmp_path / "nowhere") is mapped
    monkeypatch.setattr(memory, "HUGE_FROM", 1)
    own = quantize(tiny.master())
    assert in_huge_pages(own, 10 * GB, free) is own  # not mapped
    monkeypatch.delattr("mmap.MADV_HUGEPAGE", raising=False)
    assert in_huge_pages(mapped, 10 * GB, free) is mapped

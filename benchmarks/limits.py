"""What the machine can do at most: how fast it reads memory, and how many int8 multiply-adds it makes.

The loops are in limits.c, compiled with -march=native where they run. They stand beside every measurement of ours, so
that a figure is a share of what is possible and not of what another engine reaches.

    read = reader(threads=2)
    read(array)
"""

import ctypes
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).with_name("limits.c")

# Streams of a thread, and how many bytes ahead of the read a prefetch goes. Which is the fastest depends on the CPU.
READERS = [(1, 0), (1, 8192), (4, 0), (4, 4096)]

# One call of a peak lasts some milliseconds.
DOT_ROUNDS, AMX_ROUNDS = 1_000_000, 100_000


@cache
def library() -> ctypes.CDLL:
    """The loops, compiled for this machine.

    Raises:
        OSError: no compiler, or one that fails.
    """
    # 64-bit arm spells it -mcpu: -march=native is newer there.
    native = "-mcpu=native" if platform.machine().lower() in ("arm64", "aarch64") else "-march=native"
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "limits.so")
        command = ["cc", "-O3", native, "-shared", "-fPIC", str(SOURCE), "-o", str(built)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise OSError("no C compiler: cc is not found; install one (Debian: apt install gcc)") from None
        except subprocess.CalledProcessError as error:
            raise OSError(f"{' '.join(command)} failed; expected it to compile:\n{error.stderr}") from None
        lib = ctypes.CDLL(str(built))
    for name in ("read_1_stream", "read_4_streams"):
        getattr(lib, name).argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    for name in ("dot_peak", "amx_peak"):
        getattr(lib, name).argtypes = [ctypes.c_uint64]
        getattr(lib, name).restype = ctypes.c_uint64
    lib.dot_name.restype = ctypes.c_char_p
    return lib


def reader(threads: int) -> Callable[[np.ndarray], None]:
    """Reads an array from memory on so many threads and does next to nothing with it."""
    read_all, pool = library().read_1_stream, ThreadPoolExecutor(threads)

    def read(data: np.ndarray) -> None:
        share = data.nbytes // threads // 1024 * 1024
        list(pool.map(lambda i: read_all(data.ctypes.data + i * share, share // 64, 0), range(threads)))

    return read


def dot_name() -> str:
    """The best int8 dot product of the CPU without matrix tiles, as in "AVX-512 VNNI, vpdpbusd zmm"."""
    return library().dot_name().decode()


def peak(kind: str, threads: int, seconds: float) -> float:
    """int8 multiply-adds per second.

    Args:
        kind: "dot" for the instruction that `dot_name` names, or "amx".
        threads: that compute.
        seconds: to go on for, about.

    Returns:
        0 where the machine lacks the instruction.
    """
    run, rounds = (library().amx_peak, AMX_ROUNDS) if kind == "amx" else (library().dot_peak, DOT_ROUNDS)
    return _rate(lambda _: int(run(rounds)), threads, seconds)


def bandwidth(data: np.ndarray, threads: int, streams: int, ahead: int, seconds: float) -> float:
    """Bytes per second of reading an array over and over; each thread reads its share, and waits for no other."""
    read_all = library().read_4_streams if streams == 4 else library().read_1_stream
    share = data.nbytes // threads // 1024 * 1024

    def read(i: int) -> int:
        read_all(data.ctypes.data + i * share, share // 64, ahead // 64)
        return share

    return _rate(read, threads, seconds)


def _rate(work: Callable[[int], int], threads: int, seconds: float) -> float:
    """What threads do per second together, each calling `work` with its number at least once."""

    def one_thread(i: int) -> int:
        done = work(i)
        while done and time.perf_counter() - started < seconds:
            done += work(i)
        return done

    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        done = sum(pool.map(one_thread, range(threads)))
        return done / (time.perf_counter() - started)

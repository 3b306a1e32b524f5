"""Exact: what a process holds in memory, read from the system: weights once, a cache as it fills, pages that may go."""

import json
import subprocess
import sys

import pytest

import tiny
from onebit.engine.memory import PROCESS_BYTES
from onebit.formats import native
from onebit.parts import token_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Layers as wide as those of a model of 2 billion weights, so that the buffers of a prefill are those of one.
WIDE = tiny.config(
    vocab_size=8192, d_model=2560, n_heads=20, n_kv_heads=5, d_head=128, d_ff=6912, max_seq_len=1024
)
# A cache of 2 GB, next to which the model is nothing.
DEEP = tiny.config(d_model=32, n_layers=16, n_heads=8, n_kv_heads=8, d_head=128, max_seq_len=32768)

CHILD = """
import json, mmap, os, sys
import numpy as np
import onebit

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))

def report(**values):
    print(json.dumps({name: int(value) for name, value in values.items()}), flush=True)

path = sys.argv[1]
llm = onebit.load(path, threads=2)
"""

PREFILL = """
llm.generate(list(range(512)), max_tokens=2, temperature=0)
report(peak=status("VmHWM"), cache=9 * llm._block_bytes())
"""

CACHE = """
before = status("VmRSS")
cache = llm.model.new_cache(512)
empty = status("VmRSS") - before
ids = np.arange(64, dtype=np.int32)
table = np.arange(512, dtype=np.int32)[None]
for start in (0, 64):
    llm.model.forward(ids, ids + np.int32(start), np.array([0, 64], np.int32), table, ids[:1], cache)
report(empty=empty, used=status("VmRSS") - before, bytes=cache.bytes)
"""

DROP = """
first = llm.logits(range(8))
mapped = status("RssFile")
base = llm.checkpoint.tensors["embed.weight"].data
while not isinstance(base, mmap.mmap):
    base = base.base if isinstance(base, np.ndarray) else base.obj
base.madvise(mmap.MADV_DONTNEED)
dropped = status("RssFile")
same = llm.logits(range(8)).tobytes() == first.tobytes()
report(mapped=mapped, dropped=dropped, again=status("RssFile"), same=same)
"""


def run(program: str, path) -> dict[str, int]:
    command = [sys.executable, "-c", CHILD + program, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "wide.onebit"
    # The layout that no kernel turns into another one in memory of its own.
    native.write(tiny.synthetic(WIDE, "r64"), path)
    return path


def test_the_peak_is_the_file_the_cache_and_64_megabytes(wide):
    found = run(PREFILL, wide)
    size = wide.stat().st_size
    assert size > 45_000_000
    assert size < found["peak"] <= size + found["cache"] + PROCESS_BYTES


def test_a_cache_takes_memory_as_it_fills(tmp_path):
    native.write(tiny.synthetic(DEEP), tmp_path / "deep.onebit")
    found = run(CACHE, tmp_path / "deep.onebit")
    assert found["bytes"] > 2_000_000_000
    block = found["bytes"] // 512
    assert found["empty"] < block
    assert 2 * block <= found["used"] < 2 * block + 16_000_000


def test_weights_may_leave_memory_and_come_back(wide):
    found = run(DROP, wide)
    weights = token_bytes(native.read(wide))
    assert found["mapped"] > weights
    assert found["dropped"] < found["mapped"] - 0.9 * weights
    assert found["again"] > found["dropped"] + 0.9 * weights
    assert found["same"]

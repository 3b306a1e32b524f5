"""A conversion holds one tensor at a time. Kind: exact (a limit on the memory of a process)."""

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tiny
from onebit.checkpoint import Checkpoint, Stored, codes, rows
from onebit.formats import hf

MB = 1_000_000
# An embedding of 134 MB; 670 MB in all as float32.
CONFIG = tiny.config(
    vocab_size=65536, d_model=1024, d_ff=4096, n_layers=6, n_heads=8, n_kv_heads=8, d_head=128, max_seq_len=64
)
LARGEST = CONFIG.vocab_size * CONFIG.d_model * 2


def write_model(folder: Path) -> None:
    """A packed BitNet of that shape whose rows bfloat16 holds."""
    packed = tiny.synthetic(CONFIG)
    tensors = {}
    for name, tensor in packed.tensors.items():
        if CONFIG.is_linear(name):
            tensors[name] = Stored(
                tensor.shape,
                "codes",
                0,
                lambda a, b, t=tensor: rows("", t, a, b),
                lambda t=tensor: codes("", t, CONFIG),
            )
        elif len(tensor.shape) == 2:
            tensors[name] = Stored(
                tensor.shape, "BF16", 0, lambda a, b: np.full((b - a, CONFIG.d_model), 0.5, np.float32)
            )
        else:
            tensors[name] = tensor
    hf.write(Checkpoint(CONFIG, tensors), folder, "packed")


def peak_memory(*command: str) -> int:
    """Bytes that a process held at most, pages of files left out: the system takes those back when it needs them."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if found := re.search(r"RssAnon:\s+(\d+) kB", status):
            peak = max(peak, int(found[1]) * 1024)
        time.sleep(0.005)
    assert process.returncode == 0, process.stderr.read()
    return peak


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
@pytest.mark.parametrize("name", ["x.onebit", "x.gguf", "folder"])
def test_a_conversion_holds_one_tensor(name, tmp_path):
    write_model(tmp_path / "model")
    onebit = (sys.executable, "-m", "onebit", "convert")
    assert peak_memory(*onebit, str(tmp_path / "model"), str(tmp_path / name)) < LARGEST + 200 * MB

"""Invariant: the thread pool gives the same bits from any thread and process, and costs nothing when idle."""

import gc
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import tiny
from onebit.checkpoint import quantize
from onebit.engine.model import Model

CHECKPOINT = quantize(tiny.master())

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


def logits(model: Model, n_tokens: int = 20) -> bytes:
    positions = np.arange(n_tokens, dtype=np.int32)
    starts = np.array([0, n_tokens], np.int32)
    tables = np.zeros((1, 1), np.int32)
    return model.forward(positions, positions, starts, tables, positions, model.new_cache(1)).tobytes()


EXPECTED = logits(Model(CHECKPOINT, threads=1))


def test_python_threads_share_a_model():
    model = Model(CHECKPOINT, threads=2)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(logits, [model] * 16)) == {EXPECTED}


def test_more_threads_than_cores_still_finish():
    model = Model(CHECKPOINT, threads=4 * (os.cpu_count() or 1))
    assert logits(model) == EXPECTED


def test_models_come_and_go():
    for _ in range(20):
        assert logits(Model(CHECKPOINT, threads=3)) == EXPECTED


def test_an_idle_pool_uses_no_time():
    model = Model(CHECKPOINT, threads=3)
    logits(model)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1
    assert logits(model) == EXPECTED


@needs_fork
def test_a_forked_process_computes_and_ends():
    model = Model(CHECKPOINT, threads=2)
    logits(model)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        same = logits(model) == EXPECTED
        del model
        gc.collect()
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert logits(model) == EXPECTED


@needs_fork
def test_a_forked_process_that_never_computes_ends():
    model = Model(CHECKPOINT, threads=2)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        del model
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_an_interpreter_with_a_live_model_ends():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import tiny\n"
        "from onebit.checkpoint import quantize\n"
        "from onebit.engine.model import Model\n"
        "models = [Model(quantize(tiny.master()), threads=3) for _ in range(3)]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, os.path.dirname(tiny.__file__)], timeout=60, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")

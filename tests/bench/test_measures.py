"""Measurements ask an engine for exactly the work that they count. Kind: exact."""

import numpy as np
import pytest

from onebit.bench import measures
from onebit.bench.engines.memory import Memory


class Recorder:
    """An engine that writes down what it is asked, and answers at once."""

    info = {}
    load_s = 0.0
    vocab_size = 5

    def __init__(self):
        self.calls = []

    def use(self, threads):
        self.calls.append(("use", threads))

    def begin(self, batch, positions):
        self.calls.append(("begin", batch, positions))

    def read(self, tokens):
        self.calls.append(("read", tokens))
        return [ids[-1] + 1 for ids in tokens]

    def rewind(self, n):
        self.calls.append(("rewind", n))


def test_decode_grows_texts_from_their_context():
    engine = Recorder()
    assert measures.decode(engine, 3, 0, context=7, batch=2, tokens=3) > 0
    ids = [0, 1, 2, 3, 4, 0, 1]
    assert engine.calls == [
        ("use", 3), ("begin", 2, 10), ("read", [ids, ids]), ("rewind", 7),
        ("read", [[2], [2]]), ("read", [[3], [3]]), ("read", [[4], [4]]),
    ]  # fmt: skip


def test_a_text_that_begins_reads_no_context():
    engine = Recorder()
    measures.decode(engine, 1, 0, tokens=2)
    assert engine.calls[1:] == [("begin", 1, 2), ("rewind", 0), ("read", [[1]]), ("read", [[2]])]


def test_prefill_reads_whole_prompts():
    engine = Recorder()
    assert measures.prefill(engine, 1, 0, tokens=4, batch=2) > 0
    assert engine.calls[1:] == [("begin", 2, 4), ("rewind", 0), ("read", [[0, 1, 2, 3]] * 2)]


def test_latencies_of_a_text():
    engine = Recorder()
    found = measures.text(engine, 1, 0, prompt=2, tokens=4)
    assert (len(found["ttft"]), len(found["inter_token"])) == (1, 3)
    assert min(found["ttft"] + found["inter_token"]) >= 0
    reads = [call[1] for call in engine.calls if call[0] == "read"]
    assert reads == [[[0, 1]], [[2]], [[3]], [[4]]]
    assert measures.one_text(engine, 1, 0, prompt=2, tokens=4) >= 0


@pytest.mark.parametrize("threads", [1, 3])
def test_memory_is_read_whole(threads, monkeypatch):
    memory = Memory(800_000, threads)
    assert memory.info["settings"] == "800,000 bytes"
    seen, reduce = [], np.bitwise_or.reduce

    class Or:
        def reduce(self, part):
            seen.append(part.nbytes)
            return reduce(part)

    monkeypatch.setattr(np, "bitwise_or", Or())
    assert memory.bandwidth(threads, 0) > 0
    assert len(seen) == threads and sum(seen) == 800_000

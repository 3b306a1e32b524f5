"""Windows of a text, its perplexity, and files that hold it. Kinds: exact, invariant."""

import bz2
import gzip
import lzma
import math

import numpy as np
import pytest

import tiny
from onebit.eval.scoring import Scorer, log_sums
from onebit.eval.texts import Windows, perplexity, read_text
from onebit.llm import LLM


@pytest.fixture(scope="module")
def llm():
    return LLM(tiny.master(), threads=1)


@pytest.mark.parametrize("n", [2, 9, 10, 11, 27, 100])
@pytest.mark.parametrize(
    ("window", "stride", "bos"), [(10, 5, None), (10, 5, 0), (10, 10, None), (10, 9, 0), (10, 1, None)]
)
def test_every_token_counts_once_in_its_longest_context(n, window, stride, bos):
    tokens = list(range(1, n + 1))
    counted = []
    for ids, first in Windows(window, stride, bos).cut(tokens):
        assert len(ids) <= window and (bos is None or ids[0] == bos)
        counted += ids[first:].tolist()
    # Without begin token, the first of a text is not predicted, and of windows that do not overlap the first of each.
    missing = set() if bos is not None else set(tokens[::window] if stride == window else tokens[:1])
    assert sorted(counted) == [t for t in tokens if t not in missing]


def test_windows_of_llama_cpp():
    cut = Windows(8, 8, None, halves=True).cut(list(range(1, 21)))
    assert [(ids.tolist(), first) for ids, first in cut] == [
        ([1, 2, 3, 4, 5, 6, 7, 8], 5),
        ([9, 10, 11, 12, 13, 14, 15, 16], 5),
    ]
    cut = Windows(8, 8, 0, halves=True).cut(list(range(1, 21)))
    assert [ids.tolist() for ids, _ in cut] == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 9, 10, 11, 12, 13, 14, 15]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 193}, "window is 193; the context of this model holds 192"),
        ({"window": 3}, "window is 3; expected at least 4"),
        ({"window": 16, "stride": 17}, "stride is 17; expected 1 to 16"),
        ({"window": 16, "stride": 16, "bos": "always"}, "stride is 16; expected 1 to 15"),
        ({"window": 16, "bos": "yes"}, "bos is 'yes'; expected auto, always, never"),
        ({"window": 16, "stride": 8, "halves": True}, "leave the stride out"),
    ],
)
def test_impossible_windows_are_refused(llm, settings, message):
    with pytest.raises(ValueError, match=message):
        Windows.of(llm, **settings)


def test_begin_tokens_follow_the_policy(llm):
    assert Windows.of(llm).window == 192
    assert Windows.of(llm, 16).bos is None
    assert Windows.of(llm, 16, bos="always").bos == tiny.EOS
    begins = LLM(tiny.master(tiny.config(bos_token=5)), threads=1)
    assert Windows.of(begins, 16).bos == 5
    assert Windows.of(begins, 16, bos="never").bos is None


def test_perplexity_of_one_window_is_that_of_the_logits(llm):
    tokens = llm.tokenizer.encode(tiny.TEXT)[:150]
    text = llm.tokenizer.decode(tokens)
    assert llm.tokenizer.encode(text) == tokens
    logits = llm.logits(tokens)[:-1]
    nll = log_sums(logits) - logits[np.arange(149), tokens[1:]]
    found = perplexity(Scorer(llm), text, Windows.of(llm, 192))
    assert (found.nll == nll).all()
    assert found.perplexity.value == pytest.approx(math.exp(nll.mean()), rel=1e-12)
    bits = nll.mean() / math.log(2) * 150 / len(text.encode())
    assert found.bits_per_byte.value == pytest.approx(bits, rel=1e-12)
    assert found.perplexity.low < found.perplexity.value < found.perplexity.high


def test_a_limit_reads_the_beginning(llm):
    shares = []
    found = perplexity(Scorer(llm), tiny.TEXT, Windows.of(llm, 16), 40, shares.append)
    assert (found.n_tokens, len(found.nll), shares[-1]) == (40, 39, 1.0)
    assert found.n_bytes == len(llm.tokenizer.decode(llm.tokenizer.encode(tiny.TEXT)[:40]))


def test_a_text_without_a_token_to_predict_is_refused(llm):
    with pytest.raises(ValueError, match="no token to predict"):
        perplexity(Scorer(llm), "", Windows.of(llm, 16))
    with pytest.raises(ValueError, match="a window takes 64"):
        perplexity(Scorer(llm), "Once", Windows.of(llm, 64, halves=True))


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".xz", lzma.compress), (".bz2", bz2.compress), (".gz", gzip.compress)]
)
def test_texts_may_be_packed(tmp_path, suffix, pack):
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(pack("Grün\r\n".encode()))
    assert read_text(path) == "Grün\r\n"
    if suffix:
        for broken in (pack(b"text" * 1000)[:-20], b"no such file"):
            path.write_bytes(broken)
            with pytest.raises(ValueError, match="damaged or not fully downloaded"):
                read_text(path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"byte 2 is no UTF-8"):
        read_text(path)

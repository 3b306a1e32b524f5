"""Hostile vocabularies: each is refused in one clear line, and none crashes.

Kind: exact (the refusal, by its words).
"""

import json
import random
import struct
from base64 import b64encode

import numpy as np
import pytest

import tiny
from onebit.engine.tokenizer import Tokenizer
from onebit.formats import vocabulary

BYTES = [(bytes([byte]), byte) for byte in range(256)]
LETTERS = [("a", -1.0, 1), ("b", -2.0, 1), ("\u2581", -3.0, 1), ("ab", -4.0, 1)]


def refusal(call, *arguments) -> str:
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message and message.isascii() and message.isprintable() and len(message) < 400
    return message


def spm(*pieces, head=tiny.SENTENCEPIECE_HEAD, **options) -> bytes:
    return tiny.sentencepiece_model([*head, *LETTERS, *pieces], **options)


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2, len(content)]) + content


SENTENCEPIECE = {
    "empty": (b"", "no pieces"),
    "text": (b"this is no protobuf at all", "no protobuf at byte 1"),
    "group": (b"\x0b", "no protobuf"),
    "field zero": (b"\x02\x00", "no protobuf"),
    "endless number": (b"\xff" * 40, "a number without end"),
    "cut number": (b"\x0a\xff", "ends inside a number"),
    "huge length": (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "ends inside a field"),
    "piece is a number": (b"\x08\x01", "piece 0 of the SentencePiece model is a number"),
    "trainer is a number": (spm() + b"\x10\x01", "field 2 of the SentencePiece model is a number"),
    "text is a number": (field(1, b"\x08\x01"), "a field of another type"),
    "type is a text": (spm() + field(2, field(3, b"x")), "field 3 of the SentencePiece model is no number"),
    "no UTF-8": (field(1, field(1, b"\xff\xfe")), "not UTF-8"),
    "empty piece": (spm(("", 0.0, 1)), "piece 263 of the SentencePiece model is ''"),
    "NaN": (spm(("c", float("nan"), 1)), "with score nan"),
    "infinite": (spm(("c", float("-inf"), 1)), "with score -inf"),
    "unknown type": (spm(("c", 0.0, 9)), "'c' is of type 9"),
    "unused": (spm(("c", 0.0, 5)), "'c' is of type 5"),
    "no byte": (spm(("c", 0.0, 6)), "'c' stands for a byte"),
    "twice": (spm(("ab", 0.0, 1)), "token 'ab' is there twice, as 262 and as 263"),
    "no unknown": (spm(head=tiny.SENTENCEPIECE_HEAD[1:]), "0 unknown pieces; expected 1"),
    "two unknown": (spm(("c", 0.0, 2)), "2 unknown pieces; expected 1"),
    "lacks a byte": (spm(head=tiny.SENTENCEPIECE_HEAD[:-1]), "has no <0xFF>"),
    "lacks a byte, unigram": (spm(head=tiny.SENTENCEPIECE_HEAD[:-1], model_type=1), "has no <0xFF>"),
    "words": (spm(model_type=3), "of type word; expected BPE or unigram"),
    "made of nothing": (spm(("xa", 0.0, 1)), "'xa' is made of 'x', which is no piece"),
    "tie": (spm(("ba", -9.0, 1), ("aa", -9.0, 1), ("bb", -9.0, 1)), "the same score"),
    "urgent tie": (spm(("ba", -9.0, 1), ("aa", -9.0, 1), ("bba", -5.0, 1)), "the same score"),
    "too long": (spm(("a" * 600, 0.0, 1)), "is 600 long; expected at most 256"),
    "spaces removed around pieces": (
        spm(("c", 0.0, 4), remove_extra_whitespaces=True),
        "user-defined pieces",
    ),
    "short map": (spm() + field(3, field(2, b"\xff\xff\xff\xff\x00")), "the map of characters ends early"),
    "map is a number": (spm() + field(3, b"\x10\x01"), "a number for its map of characters"),
    "suffixes": (spm() + field(2, b"\xc0\x01\x01"), "keeps spaces behind words"),
}


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece(name):
    model, message = SENTENCEPIECE[name]
    assert message in refusal(vocabulary.from_sentencepiece, model)


def ranks(*changes: bytes) -> bytes:
    return b"\n".join([*(b64encode(token) + b" %d" % rank for token, rank in BYTES), *changes])


RANKS = {
    "empty": (b"", "0 ranks"),
    "text": (b"not a rank file", "line 1 of the rank file is b'not a rank file'"),
    "no base64": (ranks(b"!!!! 256"), "line 257 of the rank file is b'!!!! 256'"),
    "negative": (ranks(b"YWI= -1"), "expected a new token and rank"),
    "no number": (ranks(b"YWI= x"), "expected a new token and rank"),
    "rank twice": (ranks(b"YWI= 7"), "expected a new token and rank"),
    "gap": (ranks(b"YWI= 300"), "257 ranks with gaps"),
    "huge rank": (ranks(b"YWI= " + b"9" * 4000), "257 ranks with gaps"),
    "endless rank": (ranks(b"YWI= " + b"9" * 9000), "expected base64 and rank"),
    "token twice": (ranks(b"YQ== 256"), "token 'a' is there twice, as 97 and as 256"),
    "empty token": (ranks(b" 256"), "expected a new token and rank"),
    "long token": (ranks(b"YWFh" * 90 + b" 256"), "expected a new token and rank"),
    "lacks a byte": (b"YQ== 0", "no token for byte 0x00"),
    "too large": (b"\n" * ((64 << 20) + 1), "expected at most 67108864"),
}


@pytest.mark.parametrize("name", RANKS)
def test_tiktoken(name):
    file, message = RANKS[name]
    assert message in refusal(vocabulary.from_tiktoken, file, ["<|end|>"], r"\w+")


def test_tiktoken_special_tokens():
    assert "token 'a' is there twice" in refusal(vocabulary.from_tiktoken, ranks(), ["a"], r"\w+")
    assert "has no text" in refusal(vocabulary.from_tiktoken, ranks(), [""], r"\w+")
    assert "not valid Unicode" in refusal(vocabulary.from_tiktoken, ranks(), ["\ud800"], r"\w+")


GPT2 = {
    "no JSON": (b"{", b"", "vocab.json is not valid JSON"),
    "a list": (b"[]", b"", "vocab.json is not a JSON object"),
    "empty": (b"{}", b"", "has 0 tokens"),
    "twice": (b'{"a": 0, "a": 1}', b"", "'a' appears twice"),
    "one id": (b'{"a": 0, "b": 0}', b"", "one id to several"),
    "negative": (b'{"a": -1}', b"", "'a' has id -1"),
    "huge": (b'{"a": 99999999999}', b"", "'a' has id 99999999999"),
    "truth": (b'{"a": true}', b"", "'a' has id True"),
    "text": (b'{"a": "0"}', b"", "'a' has id '0'"),
    "surrogate": (b'{"\\ud800": 0}', b"", "not valid Unicode"),
    "merges no UTF-8": (b'{"a": 0}', b"\xff", "merges.txt is not UTF-8 at byte 0"),
    "one part": (b'{"a": 0}', b"a", "'a' is not two tokens"),
    "three parts": (b'{"a": 0}', b"a a a", "'a a a' is not two tokens"),
    "no token": (b'{"a": 0}', b"a b", "needs 'b', which is no token"),
    "no result": (b'{"a": 0, "b": 1}', b"a b", "needs 'ab', which is no token"),
    "merge twice": (b'{"a": 0, "b": 1, "ab": 2}', b"a b\na b", "is there twice"),
}


@pytest.mark.parametrize("name", GPT2)
def test_gpt2(name):
    vocab, merges, message = GPT2[name]
    assert message in refusal(vocabulary.from_gpt2, vocab, merges)


def llama2c(*pieces: bytes) -> bytes:
    head = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256))]
    return b"\0\0\0\0" + b"".join(struct.pack("<fi", -1.0, len(p)) + p for p in (*head, *pieces))


LLAMA2C = {
    "empty": (b"", 300, "ends after 0 of 300 pieces"),
    "cut": (llama2c(b"a"), 261, "ends after 260 of 261 pieces"),
    "longer": (llama2c(b"a"), 259, "9 bytes follow the 259 pieces"),
    "negative length": (llama2c() + struct.pack("<fi", 0, -1), 260, "claims -1 bytes"),
    "huge length": (llama2c() + struct.pack("<fi", 0, 2**31 - 1), 260, "claims 2147483647 bytes"),
    "NaN": (llama2c() + struct.pack("<fi", float("nan"), 0), 260, "has score nan"),
    "no UTF-8": (llama2c(b"\xff"), 260, "piece 259 of tokenizer.bin is not UTF-8"),
    "twice": (llama2c(b"a", b"a"), 261, "'a' is there twice"),
    "no bytes": (b"\0\0\0\0" + b"\0" * 8 * 300, 300, "are not the bytes"),
    "small": (llama2c(), 0, "has 259 to"),
    "huge": (llama2c(), 2**40, "has 259 to"),
}


@pytest.mark.parametrize("name", LLAMA2C)
def test_llama2c(name):
    data, size, message = LLAMA2C[name]
    assert message in refusal(vocabulary.from_llama2c, data, size)


def gpt2_keys(**changes) -> dict:
    keys = vocabulary.to_gguf(tiny.tokenizer_json(), tiny.CONFIG.vocab_size, None, (tiny.EOS,), None)
    return keys | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


def llama_keys(**changes) -> dict:
    keys = vocabulary.to_gguf(vocabulary.from_sentencepiece(spm()), 263, 1, (2,), None)
    return keys | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


N = tiny.CONFIG.vocab_size
GGUF = {
    "bert": (gpt2_keys(model="bert"), "tokenizer.ggml.model is 'bert'; expected 'gpt2' or 'llama'"),
    "t5": (gpt2_keys(model="t5"), "tokenizer.ggml.model is 't5'"),
    "model no text": (gpt2_keys(model=7), "tokenizer.ggml.model is 7"),
    "unknown pre": (gpt2_keys(pre="grok\n"), r"tokenizer.ggml.pre is 'grok\n'; expected one of gpt-2, phi-2"),
    "pre no text": (gpt2_keys(pre=["gpt-2"]), "tokenizer.ggml.pre is ['gpt-2']"),
    "no tokens": (gpt2_keys(tokens=None), "tokenizer.ggml.tokens is 'NoneType'; expected a list of texts"),
    "tokens one text": (gpt2_keys(tokens="abc"), "tokenizer.ggml.tokens is 'str'"),
    "empty": (gpt2_keys(tokens=[]), "has 0 tokens"),
    "bytes": (gpt2_keys(tokens=[b"a"]), "has b'a' in it"),
    "twice": (gpt2_keys(tokens=["a"] * N), "token 'a' is there twice"),
    "no merges": (gpt2_keys(merges=None), "tokenizer.ggml.merges is 'NoneType'"),
    "merge of numbers": (gpt2_keys(merges=[1]), "tokenizer.ggml.merges has 1 in it"),
    "merge of one": (gpt2_keys(merges=["abc"]), "'abc' is not two tokens"),
    "merge of none": (gpt2_keys(merges=["q zz"]), "needs 'zz', which is no token"),
    "few types": (gpt2_keys(token_type=[1]), f"is not a list of {N} numbers"),
    "nested types": (gpt2_keys(token_type=[[1], [1, 2]]), f"is not a list of {N} numbers"),
    "types of text": (gpt2_keys(token_type=["1"] * N), f"is not a list of {N} numbers"),
    "unknown type": (gpt2_keys(token_type=[7] * N), "token 0 is 7; expected 0 to 6"),
    "negative type": (gpt2_keys(token_type=np.full(N, -1)), "token 0 is -1"),
    "bos outside": (gpt2_keys(bos_token_id=N), f"bos_token_id is {N}; expected a token from 0 to {N - 1}"),
    "eos negative": (gpt2_keys(eos_token_id=-1), "eos_token_id is -1"),
    "eos truth": (gpt2_keys(eos_token_id=True), "eos_token_id is True"),
    "eos fraction": (gpt2_keys(eos_token_id=1.0), "eos_token_id is 1.0"),
    "bos without": (gpt2_keys(add_bos_token=True), "add_bos_token is true, but there is no"),
    "bos number": (gpt2_keys(add_bos_token=1), "add_bos_token is 1; expected a value of type bool"),
    "template": ({"tokenizer.chat_template": 1}, "tokenizer.chat_template is 1"),
    "no scores": (llama_keys(scores=None), "tokenizer.ggml.scores is not a list of 263 numbers"),
    "NaN scores": (llama_keys(scores=np.full(263, np.nan)), "no finite numbers"),
    "lacks bytes": (llama_keys(tokens=[f"t{i}" for i in range(263)]), "has no <0x00>"),
}


@pytest.mark.parametrize("name", GGUF)
def test_gguf(name):
    keys, message = GGUF[name]
    assert message in refusal(vocabulary.from_gguf, keys)


def document(**changes) -> bytes:
    return json.dumps(json.loads(tiny.tokenizer_json()) | changes).encode()


def model(**changes) -> bytes:
    return document(model=json.loads(tiny.tokenizer_json())["model"] | changes)


DOCUMENTS = {
    "no JSON": (b"\xff", "tokenizer.json is not UTF-8"),
    "no model": (document(model=None), "its model is None"),
    "vocab a list": (model(vocab=[["a", 0.0]]), "vocab is no table"),
    "id a text": (model(vocab={"a": "0"}), "token 'a' has id '0'"),
    "id outside": (model(vocab={"a": 320}), "token 'a' has id 320; the model has 320 tokens"),
    "id negative": (model(vocab={"a": -1}), "token 'a' has id -1"),
    "one id": (model(vocab={"a": 1, "b": 1}), "have the same id, 1"),
    "added no table": (document(added_tokens=["a"]), "added token 'a' is no table"),
    "added no list": (document(added_tokens={"a": 1}), "added_tokens no list"),
    "added elsewhere": (document(added_tokens=[{"content": "<|endoftext|>", "id": 319}]), "same id"),
    "padding taken": (model(vocab={"[PAD1]": 2}, merges=[]), "'[PAD1]' is there twice"),
    "merges a table": (model(merges={}), "merges is no list"),
    "merge of three": (model(merges=[["a", "b", "c"]]), "is not two tokens"),
    "merge of numbers": (model(merges=[[1, 2]]), "is not two tokens"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tokenizer_json(name):
    text, message = DOCUMENTS[name]
    assert message in refusal(vocabulary.to_gguf, text, N, None, (), None)


def test_tokens_of_a_model_that_do_not_fit():
    assert "bos_token_id is 320" in refusal(vocabulary.to_gguf, tiny.tokenizer_json(), N, N, (), None)
    assert "eos_token_id is -1" in refusal(vocabulary.to_gguf, tiny.tokenizer_json(), N, None, (-1,), None)
    assert "4 tokens end a text" in refusal(
        vocabulary.to_gguf, tiny.tokenizer_json(), N, None, (0, 1, 2, 3), None
    )
    assert "expected 1 to" in refusal(vocabulary.to_gguf, tiny.tokenizer_json(), 2**40, None, (), None)


def test_damage_anywhere_is_refused_or_gives_a_tokenizer():
    """Whatever a few changed bytes do, what comes out is a ValueError or a document that loads."""
    rng = random.Random(0)
    files = [
        (vocabulary.from_sentencepiece, spm(("ba", -5.0, 1), ("aba", -6.0, 4))),
        (lambda data: vocabulary.from_llama2c(data, 260), llama2c(b"ab")),
        (lambda data: vocabulary.from_tiktoken(data, ["<|end|>"], r"\w+"), ranks(b"YWI= 256")),
    ]
    for reader, file in files:
        n_read = 0
        for _ in range(150):
            damaged = bytearray(file)
            for _ in range(rng.randint(1, 3)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            try:
                read = reader(
                    bytes(damaged[: rng.randint(1, len(damaged))] if rng.random() < 0.2 else damaged)
                )
            except ValueError as error:
                assert str(error).isascii() and "\n" not in str(error)
            else:
                n_read += 1
                Tokenizer(read).encode("ab ba \u4e2d")
        assert n_read < 150

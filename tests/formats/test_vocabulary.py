"""Vocabularies of other formats.

Kinds: oracle (SentencePiece, tiktoken, and the merging rule of llama.cpp and llama2.c, written out here), invariant (a
tokenizer survives the way through GGUF keys), exact (what files say and leave unsaid).
"""

import base64
import io
import json
import struct
from functools import cache

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from onebit.formats import vocabulary
from onebit.formats.vocabulary import presplit

SPACE = "\u2581"
# Spaces and breaks in runs, digits, emoji with joiners, combining marks, CJK, contractions, what looks like pieces.
HARD = [
    *(
        "a",
        "b",
        "the",
        " the",
        "Lily",
        " dog",
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "0",
        "12",
        "3456",
    ),
    *(
        "\u00e9",
        "e\u0301",
        "\u4e2d\u56fd",
        "\u3042",
        "\U0001f600",
        "\U0001f469\u200d\U0001f467",
        "\u00a0",
        "\u3000",
    ),
    *(
        "'s",
        "'LL",
        "!",
        "...",
        "<0x41>",
        "<|",
        SPACE,
        "\u05d0\u05d1",
        "\u0e44\u0e17\u0e22",
        "\ud55c",
        "\u00bd",
        "\x00",
    ),
]
TEXTS = [
    "",
    " ",
    "Once upon a time there was a little girl named Lily.",
    *HARD,
    "".join(HARD),
    " ".join(HARD[::-1]),
]
texts = st.lists(st.sampled_from(HARD), max_size=30).map("".join) | st.text(max_size=20)

# A page with every letter in use, for trainers.
PAGE = tiny.TEXT + (
    "The quick brown fox jumps over the lazy dog, and 12 wizards vex 345 jackdaws.\n"
    "Caf\u00e9 na\u00efve \u4e2d\u56fd\u4e2d\u56fd \u00fcber \u00fcber!  Two  spaces.\n\n"
    "    def main():\n        return 42\n" * 3
)


def encode(document: bytes, text: str) -> list[int]:
    return tokenizer(document).encode(text, add_special_tokens=False).ids


@cache
def tokenizer(document: bytes) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_buffer(document)


def merged_by_score(scores: dict[str, tuple[int, float]], text: str) -> list[int]:
    """Tokens of a text: neighbours become the piece of highest score, leftmost first, until none is left to make.

    Args:
        scores: id and score of each piece, with bytes as <0x00>.
        text: as it is merged, with its spaces replaced.
    """
    parts = list(text)
    while True:
        pairs = [
            (scores[parts[i] + parts[i + 1]][1], -i)
            for i in range(len(parts) - 1)
            if parts[i] + parts[i + 1] in scores
        ]
        if not pairs:
            break
        i = -max(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    spelled = [[part] if part in scores else [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts]
    return [scores[piece][0] for piece_list in spelled for piece in piece_list]


@cache
def trained(model_type: str = "bpe", rule: str = "identity", **options) -> bytes:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PAGE.split("\n")),
        model_writer=model,
        model_type=model_type,
        normalization_rule_name=rule,
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@cache
def converted(model: bytes) -> bytes:
    return vocabulary.from_sentencepiece(model)


@cache
def oracle(model: bytes):
    return pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=model)


SPACING = [
    {"add_dummy_prefix": prefix, "remove_extra_whitespaces": remove, "byte_fallback": fallback}
    for prefix in (True, False)
    for remove in (True, False)
    for fallback in (True, False)
]


@pytest.mark.parametrize("options", SPACING, ids=str)
@settings(max_examples=40)
@given(text=texts)
def test_sentencepiece_bpe_gives_the_tokens_of_sentencepiece(options, text):
    model = trained(**options)
    assert encode(converted(model), text) == oracle(model).encode(text)


@pytest.mark.parametrize("options", [o for o in SPACING if o["byte_fallback"]], ids=str)
def test_sentencepiece_bpe_gives_its_texts_back(options):
    model = trained(**options)
    document = converted(model)
    for text in TEXTS:
        tokens = oracle(model).encode(text)
        assert encode(document, text) == tokens
        assert tokenizer(document).decode(tokens) == oracle(model).decode(tokens)


@pytest.mark.parametrize("options", SPACING, ids=str)
@settings(max_examples=40)
@given(text=texts)
def test_sentencepiece_unigram_finds_the_likeliest_pieces(options, text):
    model = trained("unigram", **options)
    # Text that spells the name of a byte is that byte to the library.
    for each in (text.replace("<0x", "<0y"), *(t for t in TEXTS if "<0x" not in t)):
        ours, theirs = encode(converted(model), each), oracle(model).encode(each)
        if ours != theirs:  # two ways, equally likely
            score = oracle(model).get_score
            assert sum(map(score, ours)) == pytest.approx(sum(map(score, theirs)), abs=1e-4)
            assert tokenizer(converted(model)).decode(ours) == oracle(model).decode(theirs)


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc"])
@given(text=st.lists(st.sampled_from(HARD), max_size=30).map("".join))
def test_sentencepiece_characters_are_mapped(rule, text):
    model = trained(rule=rule)
    for each in (text, "".join(HARD), "\ufb01 \uff21\uff22 \u2460 \u30cf\u309a"):
        assert encode(converted(model), each) == oracle(model).encode(each)


def test_user_defined_pieces_are_found_as_they_are_written():
    options = {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "byte_fallback": True}
    model = trained(user_defined_symbols=f"<sep>,{SPACE}{SPACE}", **options)
    document = converted(model)
    for text in ("Lily<sep>the dog", "<sep><sep>", "Lily  the   dog", "<se p>"):
        assert encode(document, text) == oracle(model).encode(text)
    added = {
        token.content: token.special for token in tokenizer(document).get_added_tokens_decoder().values()
    }
    assert added == {"<unk>": True, "<s>": True, "</s>": True, "<sep>": False, "  ": False}


@cache
def spaces_of_equal_score() -> bytes:
    runs = [(SPACE * n, -1e9, 1) for n in (2, 4, 8, 16, 3, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15)]
    words = [(SPACE + "x", -1.0, 1), (SPACE, -2.0, 1), ("x", -3.0, 1)]
    return tiny.sentencepiece_model([*tiny.SENTENCEPIECE_HEAD, *runs, *words])


@pytest.mark.parametrize("n", range(40))
def test_runs_of_spaces_of_equal_score_grow_from_the_left(n):
    text = " " * n + "x" + " " * n
    assert encode(converted(spaces_of_equal_score()), text) == oracle(spaces_of_equal_score()).encode(text)


@given(
    st.lists(
        st.tuples(st.text("abc", min_size=2, max_size=5), st.integers(-8, 0)),
        unique_by=lambda p: p[0],
        max_size=14,
    ),
    st.lists(st.text("abc", max_size=12), min_size=5, max_size=5),
)
@settings(max_examples=300)
def test_pieces_of_any_scores_are_made_as_sentencepiece_makes_them_or_refused(pieces, words):
    letters = [(letter, -20.0 - i, 1) for i, letter in enumerate("abc" + SPACE)]
    model = tiny.sentencepiece_model(
        [*tiny.SENTENCEPIECE_HEAD, *letters, *((text, score, 1) for text, score in pieces)]
    )
    try:
        document = vocabulary.from_sentencepiece(model)
    except ValueError as error:
        assert "the same score" in str(error)
        assert len({score for _, score in pieces}) < len(pieces)
        return
    for word in words:
        assert encode(document, word) == oracle(model).encode(word)


def rank_file(tokens: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


PATTERN = r"\w+| ?\S|\s+"
BYTES = [bytes([byte]) for byte in range(256)]


@given(
    st.lists(
        st.binary(min_size=2, max_size=6) | st.text("ab ", min_size=2).map(str.encode),
        max_size=30,
        unique=True,
    ),
    texts,
)
def test_tiktoken_ranks_in_any_order_give_the_tokens_of_tiktoken(tokens, text):
    tiktoken = pytest.importorskip("tiktoken")
    tokens = [*BYTES[::-1], *tokens]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding(
        "tiny", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|end|>": len(ranks)}
    )
    document = vocabulary.from_tiktoken(rank_file(tokens), ["<|end|>"], PATTERN)
    for each in (text, "abba ab<|end|>  aab abab", "".join(HARD)):
        assert encode(document, each) == encoding.encode(each, allowed_special="all")
        assert tokenizer(document).decode(encode(document, each), skip_special_tokens=False) == each


def test_special_tokens_of_llama_3():
    names = vocabulary.LLAMA3_SPECIAL_TOKENS
    assert len(names) == len(set(names)) == 256
    assert names[:2] == ("<|begin_of_text|>", "<|end_of_text|>")
    assert names[2:6] == tuple(f"<|reserved_special_token_{i}|>" for i in range(4))
    assert names[6:10] == (
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|reserved_special_token_4|>",
        "<|eot_id|>",
    )
    assert names[10] == "<|reserved_special_token_5|>" and names[255] == "<|reserved_special_token_250|>"


def gpt2_files() -> tuple[bytes, bytes]:
    model = json.loads(tiny.tokenizer_json())["model"]
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"]), ""]
    return json.dumps(model["vocab"]).encode(), "\n".join(lines).encode()


@given(texts)
def test_the_two_files_of_gpt2_are_the_tokenizer_that_they_came_from(text):
    document = vocabulary.from_gpt2(*gpt2_files())
    assert encode(document, text) == encode(tiny.tokenizer_json(), text)
    assert encode(document, "<|endoftext|>") == [tiny.EOS]


def llama2c_pieces() -> list[tuple[str, float]]:
    scored = [
        ("<unk>", 0.0),
        ("\n<s>\n", 0.0),
        ("\n</s>\n", 0.0),
        *((text, 0.0) for text, _, _ in tiny.SENTENCEPIECE_HEAD[3:]),
    ]
    words = [" t", "he", " the", "in", " d", "og", " dog", "  ", "an", "the"]
    scored += [(word, -float(i)) for i, word in enumerate(words)]
    return scored + [(letter, -100.0 - i) for i, letter in enumerate(" abcdefghijklmnopqrst\u4e2d")]


def llama2c_file(pieces: list[tuple[str, float]]) -> bytes:
    entries = [struct.pack("<fi", score, len(text.encode())) + text.encode() for text, score in pieces]
    return struct.pack("<i", 7) + b"".join(entries)


@given(texts)
def test_llama2c_file_is_merged_by_its_rule(text):
    pieces = llama2c_pieces()
    # To llama2.c this character is no space.
    for each in (text.replace(SPACE, "_"), "the dog in the inn  and the  dog", "\u4e2d\u56fd the"):
        scores = {piece: (i, score) for i, (piece, score) in enumerate(pieces)}
        expected = merged_by_score(scores, " " + each) if each else []
        assert encode(vocabulary.from_llama2c(llama2c_file(pieces), len(pieces)), each) == expected


@cache
def llama3_like() -> bytes:
    tokens = [*BYTES, b" t", b"he", b" the", b"in", b"12", b"345", b"\n\n", b"ily", b"Lily", b"unreachable"]
    return vocabulary.from_tiktoken(
        rank_file(tokens), vocabulary.LLAMA3_SPECIAL_TOKENS, vocabulary.LLAMA3_PATTERN
    )


DOCUMENTS = {
    "gpt-2": tiny.tokenizer_json,
    "llama-bpe": llama3_like,
    "default": lambda: vocabulary.from_sentencepiece(
        trained(byte_fallback=True, remove_extra_whitespaces=False)
    ),
}


@pytest.mark.parametrize("pre", DOCUMENTS)
@settings(max_examples=40)
@given(text=texts)
def test_a_tokenizer_survives_the_keys_of_a_gguf_file(pre, text):
    document = DOCUMENTS[pre]()
    size = tokenizer(document).get_vocab_size() + 5
    keys = vocabulary.to_gguf(document, size, 1, (0, 2), "{{ x }}")
    assert keys["tokenizer.ggml.pre"] == pre
    read = vocabulary.from_gguf(keys)
    assert read[1:] == (1, (0, 2), "{{ x }}")
    for each in (text, "".join(HARD), "<|endoftext|> <|eot_id|>", "Lily</s>the"):
        assert encode(read.tokenizer, each) == encode(document, each)


@given(texts)
def test_scores_merge_as_the_merges_did(text):
    document = DOCUMENTS["default"]()
    size = tokenizer(document).get_vocab_size()
    keys = vocabulary.to_gguf(document, size, 1, (2,), None)
    assert (
        keys["tokenizer.ggml.scores"].dtype == np.float32
        and keys["tokenizer.ggml.token_type"].dtype == np.int32
    )
    pairs = zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"].tolist(), strict=True)
    scores = {token: (i, score) for i, (token, score) in enumerate(pairs)}
    for each in (text, "".join(HARD)):
        prefixed = (" " + each if each else "").replace(" ", SPACE)
        assert encode(document, each) == merged_by_score(scores, prefixed)


def test_tokens_of_every_type_are_written_and_padded():
    document = json.loads(tiny.tokenizer_json())
    size = len(document["model"]["vocab"])
    document["added_tokens"].append(
        document["added_tokens"][0] | {"id": size, "content": "<tool>", "special": False}
    )
    keys = vocabulary.to_gguf(json.dumps(document).encode(), size + 3, None, (), None)
    assert keys["tokenizer.ggml.tokens"][-3:] == ["<tool>", f"[PAD{size + 1}]", f"[PAD{size + 2}]"]
    assert keys["tokenizer.ggml.token_type"].tolist() == [3, *[1] * (size - 1), 4, 5, 5]
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert (
        not {"tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "tokenizer.chat_template"}
        & keys.keys()
    )
    read = vocabulary.from_gguf(keys).tokenizer
    assert encode(read, "<tool>") == [size] and tokenizer(read).decode([size]) == "<tool>"
    assert vocabulary.to_gguf(read, size + 3, None, (), None).keys() == keys.keys()


def gguf(**changes) -> dict:
    keys = vocabulary.to_gguf(tiny.tokenizer_json(), tiny.CONFIG.vocab_size, None, (), None)
    del keys["tokenizer.ggml.add_bos_token"]
    return keys | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


@pytest.mark.parametrize(
    ("changes", "bos"),
    [
        ({"pre": "gpt-2", "bos_token_id": 0}, None),
        ({"pre": "llama-bpe", "bos_token_id": 0}, 0),
        ({"pre": "tekken", "bos_token_id": 0}, 0),
        ({"pre": "llama-bpe"}, None),
        ({"pre": "llama-bpe", "bos_token_id": 0, "add_bos_token": False}, None),
        ({"pre": "gpt-2", "bos_token_id": 0, "add_bos_token": True}, 0),
    ],
)
def test_whether_a_text_begins_with_a_token(changes, bos):
    assert vocabulary.from_gguf(gguf(**changes)).bos_token == bos


def test_a_sentencepiece_vocabulary_has_defaults():
    keys = vocabulary.to_gguf(DOCUMENTS["default"](), 1000, 1, (2,), None)
    for name in ("bos_token_id", "eos_token_id", "unknown_token_id", "add_bos_token", "add_space_prefix"):
        del keys[f"tokenizer.ggml.{name}"]
    read = vocabulary.from_gguf(keys)
    assert (read.bos_token, read.eos_tokens) == (1, (2,))
    assert encode(read.tokenizer, "Lily ran") == encode(DOCUMENTS["default"](), "Lily ran")


def test_runs_of_spaces_that_a_model_defines_itself_are_made_by_merging():
    runs = [(SPACE * n, 0.0, 4) for n in (2, 3, 4)]
    letters = [(SPACE, -1.0, 1), ("a", -2.0, 1), (SPACE + "a", -3.0, 1)]
    pieces = [*tiny.SENTENCEPIECE_HEAD, *runs, *letters]
    keys = {
        "model": "llama",
        "tokens": [text for text, _, _ in pieces],
        "scores": [score for _, score, _ in pieces],
        "token_type": [kind for _, _, kind in pieces],
        "add_space_prefix": False,
    }
    read = vocabulary.from_gguf({f"tokenizer.ggml.{name}": value for name, value in keys.items()})
    scores = {text: (i, score) for i, (text, score, _) in enumerate(pieces)}
    for n in range(20):
        text = " " * n + "a" + " " * n
        assert encode(read.tokenizer, text) == merged_by_score(scores, text.replace(" ", SPACE))


def test_ends_of_a_text_are_named_or_known():
    keys = vocabulary.to_gguf(llama3_like(), 522, 266, (267, 275), None)
    assert keys["tokenizer.ggml.eot_token_id"] == 275
    assert vocabulary.from_gguf(keys).eos_tokens == (267, 275)
    del keys["tokenizer.ggml.eot_token_id"]
    assert vocabulary.from_gguf(keys).eos_tokens == (267, 275)
    # A token with that name that is ordinary text ends nothing.
    keys["tokenizer.ggml.token_type"][275] = 1
    assert vocabulary.from_gguf(keys).eos_tokens == (267,)


@pytest.mark.parametrize("model", [None, "no_vocab", "none"])
def test_a_file_without_vocabulary(model):
    keys = {"tokenizer.ggml.model": model, "tokenizer.chat_template": "{{ x }}"}
    assert vocabulary.from_gguf(keys) == (None, None, (), "{{ x }}")


def test_a_file_that_names_no_presplit_gets_the_default():
    keys = gguf()
    del keys["tokenizer.ggml.pre"]
    assert json.loads(vocabulary.from_gguf(keys).tokenizer)["pre_tokenizer"] == presplit.to_json(
        presplit.PRESPLITS["default"].steps
    )


def cut(name: str, text: str) -> list[str]:
    read = json.loads(vocabulary.from_gguf(gguf(pre=name)).tokenizer)
    backend = tokenizers.Tokenizer.from_str(json.dumps(read))
    spans = [span for _, span in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt-2", ["I", "'ll", " pay", " 1234", "!!", "\n ", " HELLO", "'", "LL"]),
        ("llama-bpe", ["I", "'ll", " pay", " ", "123", "4", "!!\n", " ", " HELLO", "'LL"]),
        ("qwen2", ["I", "'ll", " pay", " ", "1", "2", "3", "4", "!!\n", " ", " HELLO", "'LL"]),
        ("smollm", ["I", "'ll", " pay", " ", "1", "2", "3", "4", "!!", "\n ", " HELLO", "'", "LL"]),
        ("gpt-4o", ["I'll", " pay", " ", "123", "4", "!!\n", " ", " HELLO'LL"]),
        ("tekken", ["I", "'ll", " pay", " ", "1", "2", "3", "4", "!!\n", " ", " HELLO", "'LL"]),
        ("falcon", ["I", "'", "ll", " pay", " ", "123", "4", "!!", "\n ", " HELLO", "'", "LL"]),
        ("deepseek-v3", ["I", "'ll", " pay", " ", "123", "4", "!!\n", " ", " HELLO", "'LL"]),
        (
            "deepseek-llm",
            ["I", "'", "ll", " pay", " ", "1", "2", "3", "4", "!!", "\n", " ", " HELLO", "'", "LL"],
        ),
    ],
)
def test_words_are_cut_as_the_name_says(name, words):
    assert cut(name, "I'll pay 1234!!\n  HELLO'LL") == words


@pytest.mark.parametrize("name", presplit.PRESPLITS)
def test_a_presplit_is_recognised_in_a_tokenizer(name):
    split = presplit.PRESPLITS[name]
    assert presplit.from_json(presplit.to_json(split.steps)) == split.steps
    read = vocabulary.from_gguf(gguf(pre=name)).tokenizer
    written = vocabulary.to_gguf(read, tiny.CONFIG.vocab_size, None, (), None)["tokenizer.ggml.pre"]
    assert presplit.PRESPLITS[written] == split._replace(bos=presplit.PRESPLITS[written].bos)
    assert encode(read, "Once 12 \u00e9") != []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["model"].update(type="WordPiece"), "its model is 'WordPiece', not BPE"),
        (lambda d: d["model"].update(dropout=0.1), "it has a dropout"),
        (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "no name for its way to cut"),
        (lambda d: d["model"].update(ignore_merges=True), "no name for its way to cut"),
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "no name for its way to cut .*Lowercase"),
        (lambda d: d.update(decoder=None), "not byte-level, and does not treat spaces"),
        (lambda d: d["added_tokens"][0].update(rstrip=True), "takes spaces or words around it along"),
    ],
)
def test_what_gguf_cannot_express_is_refused(change, reason):
    document = json.loads(tiny.tokenizer_json())
    change(document)
    with pytest.raises(ValueError, match=f"^this tokenizer cannot be expressed in GGUF: .*{reason}"):
        vocabulary.to_gguf(json.dumps(document).encode(), tiny.CONFIG.vocab_size, None, (0,), None)


def test_merges_that_scores_cannot_say_are_refused():
    document = json.loads(converted(spaces_of_equal_score()))
    # A piece that no merge makes: llama.cpp would make it all the same.
    document["model"]["merges"].remove([SPACE, "x"])
    with pytest.raises(ValueError, match="scores cannot say of what"):
        vocabulary.to_gguf(json.dumps(document).encode(), 1000, 1, (2,), None)

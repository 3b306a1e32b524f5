"""Invariant: text survives encoding, and pieces of text joined are the decoded whole."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from onebit.engine.tokenizer import Detokenizer, Tokenizer, normalize

TOKENIZER = Tokenizer(tiny.tokenizer_json(), eos_token=tiny.EOS)
# Pieces of characters of two to four bytes, so that random texts are cut inside them.
HARD_TEXT = "a\u00e9\u4e16\U0001f600\u200d b\ufffdz"


def byte_tokens():
    """Token of each byte, by the printable stand-in that byte-level BPE has for it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    vocabulary = json.loads(tiny.tokenizer_json())["model"]["vocab"]
    return [vocabulary[chr(byte if byte in printable else next(others))] for byte in range(256)]


BYTE_TOKENS = byte_tokens()


def pieces(tokens, stop=(), tokenizer=TOKENIZER):
    detokenizer = Detokenizer(tokenizer, stop)
    texts = [detokenizer.push(token) for token in tokens]
    return [*texts, detokenizer.flush()]


@given(st.text())
def test_decode_inverts_encode(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_bos_is_put_first_only_when_the_model_has_one():
    with_bos = Tokenizer(tiny.tokenizer_json(), bos_token=tiny.EOS)
    assert with_bos.encode("Once") == [tiny.EOS, *TOKENIZER.encode("Once")]
    assert with_bos.decode(with_bos.encode("Once")) == "Once"
    assert tiny.EOS not in TOKENIZER.encode("Once")


def test_special_tokens_in_a_text_are_recognised():
    assert TOKENIZER.encode("<|endoftext|>") == [tiny.EOS]


@given(st.lists(st.integers(0, tiny.CONFIG.vocab_size - 1)))
def test_pieces_of_any_tokens_joined_are_the_decoded_whole(tokens):
    assert "".join(pieces(tokens)) == TOKENIZER.decode(tokens)


@given(st.text(alphabet=HARD_TEXT))
def test_pieces_never_split_a_character(text):
    # One token for each byte: the hardest case.
    got = pieces([BYTE_TOKENS[byte] for byte in text.encode()])
    assert "".join(got) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in got)
        assert got[-1] == ""


@given(st.text(alphabet="ab "), st.lists(st.text(alphabet="ab ", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(text, stop):
    tokens = TOKENIZER.encode(text)
    detokenizer = Detokenizer(TOKENIZER, stop)
    shown = ""
    for token in tokens:
        shown += detokenizer.push(token)
        assert not any(string in shown for string in stop)
        if detokenizer.stopped:
            break
    shown += detokenizer.flush()
    read = TOKENIZER.decode(tokens)
    starts = [read.find(string) for string in stop if string in read]
    assert detokenizer.stopped == bool(starts)
    if not starts:
        assert shown == read
    else:
        # The stop string that is complete first ends the text.
        assert read.startswith(shown)
        assert any(read[len(shown) :].startswith(string) for string in stop)
        assert not any(string in shown for string in stop)


def test_stop_string_over_three_tokens_is_cut_off():
    tokens = [token for part in ("ball", "x", "yz", "q") for token in TOKENIZER.encode(part)]
    assert "".join(pieces(tokens, stop=["lxyzq"])) == "bal"
    assert "".join(pieces(tokens, stop=["lxyzp"])) == "ballxyzq"


def test_chat_template_is_rendered_and_encoded():
    tokenizer = Tokenizer(tiny.tokenizer_json(), chat_template=tiny.CHAT_TEMPLATE)
    tokens = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert tokenizer.decode(tokens) == "user: Hi\nassistant: "


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[0].content + 1 }}", "chat template"),
        ("{% for", "chat template"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_chat_template_errors_are_value_errors(template, message):
    tokenizer = Tokenizer(tiny.tokenizer_json(), chat_template=template)
    with pytest.raises(ValueError, match=message):
        tokenizer.encode_chat([{"role": "user", "content": "Hi"}])


def test_malformed_messages_are_refused():
    tokenizer = Tokenizer(tiny.tokenizer_json(), chat_template=tiny.CHAT_TEMPLATE)
    with pytest.raises(ValueError, match="'role' and 'content'"):
        tokenizer.encode_chat(["Hi"])


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b"[1, 2]"])
def test_damaged_tokenizer_is_a_value_error(data):
    with pytest.raises(ValueError, match="tokenizer.json"):
        Tokenizer(data)


def test_text_that_is_no_unicode_is_a_value_error():
    with pytest.raises(ValueError, match="Unicode"):
        TOKENIZER.encode("a\udcff")
    with pytest.raises(ValueError, match="None is no text"):
        TOKENIZER.encode(None)


@pytest.mark.parametrize("token", [-1, 2**32, 1.5, None, "1"])
def test_what_is_no_token_id_is_a_value_error(token):
    with pytest.raises(ValueError, match="is no token id"):
        TOKENIZER.decode([1, token])


def changed(**changes):
    return json.dumps(json.loads(tiny.tokenizer_json()) | changes).encode()


def test_settings_for_batches_leave_a_prompt_whole():
    # Padding to 10^12 tokens would end the process.
    side = {"direction": "Right", "strategy": {"Fixed": 10**12}, "pad_to_multiple_of": None}
    padding = side | {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    tokenizer = Tokenizer(changed(padding=padding, truncation=truncation))
    assert tokenizer.encode("Once upon a time") == TOKENIZER.encode("Once upon a time")


@pytest.mark.parametrize(
    "changes",
    [
        # An exception of no kind, and two panics: in the reader and in the encoder.
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"model": json.loads(tiny.tokenizer_json())["model"] | {"continuing_subword_prefix": "\u00e9" * 4}},
    ],
)
def test_a_tokenizer_that_fails_is_a_value_error(changes):
    with pytest.raises(ValueError, match="^tokenizer: "):
        Tokenizer(changed(**changes)).encode("Once upon a time")


INVISIBLE = "\u00ad\u200b\u200c\u200d\u2060\ufeff"


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("co\u00adop\u200ber\ufeffate", "cooperate"),
        ("a \t\u00a0\u200b b", "a b"),
        ("a \r\n b", "a\nb"),
        ("a\r \r\n\u200d\n\n b ", "a\n\nb "),
        (" \u00e9 e\u0301 \uff21", " \u00e9 e\u0301 \uff21"),
        ("", ""),
    ],
)
def test_what_nobody_sees_goes(text, normal):
    assert normalize(text) == normal


@given(st.text(st.sampled_from("ab\u00e9\U0001f600 \t\r\n\u00a0\u2028" + INVISIBLE)))
def test_normalizing_keeps_every_character_that_is_seen(text):
    def seen(text):
        return [c for c in text if not c.isspace() and c not in INVISIBLE]

    normal = normalize(text)
    assert seen(normal) == seen(text) and normalize(normal) == normal
    assert len(normal) <= len(text) and not set(normal) - set("ab\u00e9\U0001f600 \n")


def test_only_what_users_write_is_normalized_and_only_if_asked():
    template = "{% for m in messages %}\t\t{{ m.content }}{% endfor %}"
    plain = Tokenizer(tiny.tokenizer_json(), None, template)
    asked = Tokenizer(tiny.tokenizer_json(), None, template, normalize=True)
    written = "the  do\u00adg"
    chat = [{"role": "user", "content": written}, {"role": "user", "content": None}]
    assert (plain.prepare(written), asked.prepare(written)) == (written, "the dog")
    assert plain.render_chat(chat) == f"\t\t{written}\t\tNone"
    assert asked.decode(asked.encode_chat(chat)) == "\t\tthe dog\t\tNone"
    assert asked.encode(written) == plain.encode(written)
    assert chat[0]["content"] == written

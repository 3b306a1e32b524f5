"""Text to tokens and back: the tokenizer of a checkpoint, its chat template, and text piece by piece.

Knows nothing of models or requests.

    tokenizer = Tokenizer(checkpoint.tokenizer, bos_token=0)
    tokenizer.decode(tokenizer.encode("Once upon a time"))
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from numbers import Integral
from typing import Any

import tokenizers

# What a decoder writes for bytes that are no character, or not yet.
_INCOMPLETE = "\ufffd"

# Soft hyphen, zero-width space, non-joiner, joiner, word joiner, byte-order mark.
_INVISIBLE = re.compile("[\u00ad\u200b\u200c\u200d\u2060\ufeff]+")
_LINE_BREAK = re.compile(r"\r\n?")
_WHITE_SPACE = re.compile(r"\s+")


def normalize(text: str) -> str:
    """A text without what nobody sees of it.

    Soft hyphens and zero-width characters (U+00AD, U+200B to U+200D, U+2060, U+FEFF) go. A run of white space becomes
    an empty line where it holds two line breaks or more, one line break where it holds one, else one space. Nothing
    else changes: no letter is composed or folded. Text that needs joiners (Persian, Indic scripts, some emoji), tables
    and indented code lose by it.

    Args:
        text: any text.
    """
    text = _LINE_BREAK.sub("\n", _INVISIBLE.sub("", text))
    return _WHITE_SPACE.sub(lambda run: "\n" * min(run[0].count("\n"), 2) or " ", text)


class Tokenizer:
    """Encodes and decodes text; special tokens written out in a text are recognised.

    Args:
        data: a tokenizer.json.
        bos_token: id put before every text, or None.
        chat_template: jinja2 source, or None.
        eos_token: id known to the chat template as `eos_token`, or None.
        normalize: whether `prepare` changes texts.

    Raises:
        ValueError: data is no tokenizer.json.
    """

    def __init__(
        self,
        data: bytes,
        bos_token: int | None = None,
        chat_template: str | None = None,
        eos_token: int | None = None,
        normalize: bool = False,
    ) -> None:
        with _refusing("not a readable tokenizer.json"):
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
            # Settings for training on batches: they would cut or lengthen a prompt without a word.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.chat_template = chat_template
        self.normalize = normalize
        # Tokens of bytes: the text of several is that of each, one after another, but for cut characters.
        self._is_bytewise = isinstance(self._tokenizer.decoder, tokenizers.decoders.ByteLevel)
        self._wholes: dict[int, str | None] = {}

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id, of special ones too."""
        return 1 + max(self._tokenizer.get_vocab().values(), default=-1)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: a text of n tokens has at most n times as many."""
        return max(map(len, self._tokenizer.get_vocab()), default=1)

    def prepare(self, text: str) -> str:
        """What a user wrote as it is to be encoded: `normalize`d where that is asked for. Chats need no other call."""
        return normalize(text) if self.normalize else text

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """Token ids of a text, after the model's begin-of-sequence token if it has one.

        Args:
            text: to encode.
            begin: put the begin-of-sequence token first.

        Raises:
            ValueError: no valid text, or one that the tokenizer has no tokens for.
        """
        ids = self._encode(text)
        return [self.bos_token, *ids] if begin and self.bos_token is not None else ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; special and unknown tokens are left out, bytes that are no UTF-8 become U+FFFD.

        Raises:
            ValueError: something else than token ids.
        """
        for token in tokens:
            if not isinstance(token, Integral) or not 0 <= token < 2**32:
                raise ValueError(f"{token!r} is no token id; expected whole numbers from 0 to 2^32 - 1")
        with _refusing("cannot decode these tokens"):
            return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def decode_whole(self, token: int) -> str | None:
        """Text of a token that is the same in every company; None if there is none such."""
        if token not in self._wholes:
            text = self.decode([token])
            self._wholes[token] = text if self._is_bytewise and _INCOMPLETE not in text else None
        return self._wholes[token]

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins.

        Args:
            messages: {"role": "system" | "user" | "assistant", "content": text}, oldest first.

        Raises:
            ValueError: no chat template, malformed messages, or messages that the template refuses.
        """
        return self._encode(self.render_chat(messages))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """A conversation as the chat template writes it.

        Args:
            messages: {"role": "system" | "user" | "assistant", "content": text}, oldest first.
            add_generation_prompt: end where the assistant's answer begins.
            tools: what the model may call, as its template knows them.

        Raises:
            ValueError: see `encode_chat`.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template; use generate or stream with a text instead")
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise ValueError(f"chat message {message!r}: expected a dict with 'role' and 'content'")
        if self.normalize:
            messages = [
                {**message, "content": normalize(message["content"])}
                if isinstance(message["content"], str)
                else message
                for message in messages
            ]
        try:
            text: str = self._template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                tools=tools and list(tools),
                # Asked for by templates that know them, as nothing.
                documents=None,
                bos_token=self._written(self.bos_token),
                eos_token=self._written(self.eos_token),
            )
        except Exception as error:  # whatever the template's own code raises
            raise ValueError(f"chat template: {error}") from None
        return text

    @cached_property
    def _template(self) -> Any:
        # Sandboxed: a template is code that arrives with a model file.
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        def strftime_now(format: str) -> str:
            return datetime.now().strftime(format)

        def tojson(value: Any, indent: int | None = None, **rest: Any) -> str:
            # jinja's own would escape what HTML needs escaped.
            return json.dumps(value, ensure_ascii=False, indent=indent, **rest)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
        environment.filters["tojson"] = tojson
        return environment.from_string(self.chat_template or "")

    def _encode(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise ValueError(f"{text!r} is no text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode at character {error.start}") from None
        with _refusing("cannot encode this text"):
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _written(self, token: int | None) -> str:
        return "" if token is None else self._tokenizer.id_to_token(token) or ""


class Detokenizer:
    """Text of a growing list of tokens, piece by piece: no character is split, no stop string shown.

    The pieces joined are the decoded tokens, cut before the first stop string.

    Args:
        tokenizer: of the model.
        stop: strings that end the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        # Tokens since the last complete character but one: some decoders need to see what came before.
        self._tokens: list[int] = []
        self._n_shown = 0
        self._held = ""

    def push(self, token: int) -> str:
        """Add a token and return the text that is now certain."""
        # Almost every token of almost every text: no character is cut before it or in it.
        if len(self._tokens) == self._n_shown and (text := self._tokenizer.decode_whole(token)) is not None:
            self._tokens, self._n_shown = [token], 1
            return self._release(text)
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if text.endswith(_INCOMPLETE):
            return ""
        before = self._tokenizer.decode(self._tokens[: self._n_shown])
        if len(text) > len(before):
            self._tokens = self._tokens[self._n_shown :]
            self._n_shown = len(self._tokens)
        return self._release(text[len(before) :])

    def flush(self) -> str:
        """End the text and return what was held back."""
        before = self._tokenizer.decode(self._tokens[: self._n_shown])
        text = self._release(self._tokenizer.decode(self._tokens)[len(before) :])
        text, self._held, self._n_shown = text + self._held, "", len(self._tokens)
        return text

    def _release(self, new: str) -> str:
        if not self._stop:
            return new
        if self.stopped:
            return ""
        text = self._held + new
        starts = [start for start in map(text.find, self._stop) if start >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


@contextmanager
def _refusing(problem: str) -> Iterator[None]:
    """Turn whatever a tokenizer.json of unknown origin provokes in the bindings into a ValueError."""
    try:
        yield
    except MemoryError:
        raise
    except BaseException as error:
        # Bare Exceptions, and panics, which are not even those.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        # Its words may repeat the file's, of any length and in any alphabet.
        words = ascii(str(error))[1:-1]
        words = words if len(words) <= 300 else f"{words[:297]}..."
        raise ValueError(f"tokenizer: {problem} ({words})") from None


def _overlap(text: str, stop: str) -> int:
    # Length of the longest end of text that begins the stop string.
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)

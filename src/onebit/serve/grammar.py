"""Answers that fit a JSON schema or a grammar: llguidance, within limits of time and memory.

vocabulary = Vocabulary(tokenizer_json, vocab_size=4096, eos_tokens=(0,))
params = SamplingParams(grammar=vocabulary.from_schema({"type": "object"}))
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from onebit.serve.protocol import MAX_GRAMMAR_CHARS

# A tenth of what llguidance allows, or less: some 20 MB, and some milliseconds for each token.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=50_000,
    step_max_items=10_000,
    max_lexer_states=10_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
# At most a line break and an indentation between two parts: a small model may otherwise write blanks for ever.
_WHITESPACE = r"\n? {0,8}"


class GrammarError(ValueError):
    """A grammar that cannot be followed."""


class Grammar:
    """What may follow in one text; see `onebit.engine.sampling.Grammar`."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def copy(self) -> "Grammar":
        """The same state, for another text."""
        return Grammar(self._matcher.deep_copy())

    def mask(self, request: Any) -> npt.NDArray[np.uint32]:
        """Bits of the tokens that may come next.

        Raises:
            GrammarError: the limits are exceeded.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), "<u4")
        if self._matcher.is_error():
            raise GrammarError(_reason(self._matcher))
        return bits

    def accept(self, token: int) -> None:
        """Take in the token that was drawn.

        Raises:
            GrammarError: see `mask`.
        """
        if not self._matcher.is_stopped() and not self._matcher.consume_token(token):
            raise GrammarError(_reason(self._matcher))


class Vocabulary:
    """The tokens of a model, as bytes.

    Args:
        tokenizer: a tokenizer.json.
        vocab_size: tokens of the model, which may be more than the tokenizer has.
        eos_tokens: that end a text.
    """

    def __init__(self, tokenizer: bytes, vocab_size: int, eos_tokens: Sequence[int]) -> None:
        self._has_end = bool(eos_tokens)
        self._tokenizer = LLTokenizer(
            tokenizer.decode(), n_vocab=vocab_size, eos_token=list(eos_tokens) or None
        )
        self._bytes: dict[int, bytes] = {}

    def token_bytes(self, token: int) -> bytes:
        """What a token writes; a special one its name."""
        if token not in self._bytes:
            self._bytes[token] = self._tokenizer.decode_bytes([token])
        return self._bytes[token]

    def from_schema(self, schema: dict[str, Any]) -> Grammar:
        """JSON that fits a schema.

        Raises:
            GrammarError: a schema that is wrong, too large, or cannot be fulfilled.
        """
        try:
            text = json.dumps(schema)
        except RecursionError:
            raise GrammarError("the schema is nested too deeply") from None
        if len(text) > MAX_GRAMMAR_CHARS:
            raise GrammarError(
                f"the schema has {len(text):,} characters; at most {MAX_GRAMMAR_CHARS:,} are read"
            )
        return self._grammar(
            LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _WHITESPACE})
        )

    def from_text(self, text: str) -> Grammar:
        """What a grammar of Lark or GBNF allows.

        Raises:
            GrammarError: a grammar that is wrong, too large, or allows nothing.
        """
        try:
            return self._grammar(grammar_from("grammar", text))
        except (ValueError, RecursionError) as error:
            raise GrammarError(str(error)[:300]) from None

    def _grammar(self, source: str) -> Grammar:
        if not self._has_end:
            raise GrammarError("this model has no end-of-text token, which a grammar needs to come to an end")
        try:
            matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=_LIMITS)
        except ValueError as error:
            raise GrammarError(str(error)[:300]) from None
        if matcher.is_error():
            raise GrammarError(_reason(matcher))
        grammar = Grammar(matcher)
        # Also builds what the first token would wait for.
        if not grammar.mask(None).any():
            raise GrammarError("it allows no text")
        return grammar


def _reason(matcher: LLMatcher) -> str:
    lines = matcher.get_error().strip().splitlines()
    return lines[0][:300] if lines else "it allows no further token"

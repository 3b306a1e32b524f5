"""How generated texts are told: the bodies and stream chunks of completions and chat completions.

Knows nothing of engines but what they give: tokens, texts and logarithms of probabilities.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from onebit.engine.engine import Generation
from onebit.engine.sampling import TokenLogprobs
from onebit.serve.protocol import ChatRequest, CompletionRequest
from onebit.serve.runner import Piece
from onebit.serve.tools import Call, ToolReader

TokenBytes = Callable[[int], bytes]
# JSON has no infinity.
LEAST_LOGPROB = -9999.0


class Form(Protocol):
    """One kind of answer."""

    def first(self) -> list[dict[str, Any]]:
        """Chunks that come before any token."""

    def chunks(self, index: int, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        """Chunks for what was added to one text."""

    def whole(self, generations: Sequence[Generation]) -> list[dict[str, Any]]:
        """The choices of an answer that comes at once."""

    def envelope(self, choices: list[dict[str, Any]], is_chunk: bool) -> dict[str, Any]:
        """The body around choices."""


class CompletionForm:
    """Texts as /v1/completions tells them.

    Args:
        model: name in the answer.
        body: the request.
        prompts: token ids of each prompt.
        texts: what each prompt says, for the echo.
        token_bytes: what a token writes.
        silent: tokens that no text shows.
    """

    def __init__(
        self,
        model: str,
        body: CompletionRequest,
        prompts: Sequence[Sequence[int]],
        texts: Sequence[str],
        token_bytes: TokenBytes,
        silent: frozenset[int],
    ) -> None:
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._n = body.n or 1
        self._has_logprobs = body.logprobs is not None
        self._has_text = body.max_tokens != 0
        self._echo = bool(body.echo)
        self._prompts = prompts
        self._texts = texts
        self._token_bytes = token_bytes
        self._silent = silent
        self._offsets = [0] * (len(prompts) * self._n)
        self._begun: set[int] = set()

    def envelope(self, choices: list[dict[str, Any]], is_chunk: bool) -> dict[str, Any]:
        """The body around choices; chunks look the same."""
        return self._head | {"object": "text_completion", "choices": choices}

    def first(self) -> list[dict[str, Any]]:
        """Nothing: the echo needs what the model says of the prompt."""
        return []

    def chunks(self, index: int, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        """One chunk, unless nothing is certain yet."""
        text = ""
        told: list[TokenLogprobs | int] = []
        if self._echo and index not in self._begun:
            text, told = self._echoed(index, pieces[0].step.request)
        self._begun.add(index)
        if self._has_text:
            text += "".join(piece.step.text for piece in pieces)
            if self._has_logprobs:
                told += [logprobs for piece in pieces for logprobs in piece.step.logprobs]
        is_last = pieces[-1].step.is_last
        if not (text or told or is_last):
            return []
        reason = self._reason(pieces[-1].step.request) if is_last else None
        return [self.envelope([self._choice(index, text, told, reason)], is_chunk=True)]

    def whole(self, generations: Sequence[Generation]) -> list[dict[str, Any]]:
        """A choice for each text."""
        choices = []
        for index, generation in enumerate(generations):
            text, told = self._echoed(index, generation) if self._echo else ("", [])
            if self._has_text:
                text += generation.text
                told = [*told, *generation.logprobs] if self._has_logprobs else []
            choices.append(self._choice(index, text, told, self._reason(generation)))
        return choices

    def _reason(self, generation: Generation) -> str | None:
        return generation.finish_reason if self._has_text else "length"

    def _echoed(self, index: int, generation: Generation) -> tuple[str, list[TokenLogprobs | int]]:
        prompt = self._prompts[index // self._n]
        told: list[TokenLogprobs | int] = []
        if self._has_logprobs:
            # The first token follows nothing, so nothing is known of it.
            told = [
                logprobs or token for token, logprobs in zip(prompt, generation.prompt_logprobs, strict=True)
            ]
        return self._texts[index // self._n], told

    def _choice(
        self, index: int, text: str, told: Sequence[TokenLogprobs | int], reason: str | None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(index, told) if self._has_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, told: Sequence[TokenLogprobs | int]) -> dict[str, Any]:
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for one in told:
            token = one if isinstance(one, int) else one.token
            name = self._name(token)
            tokens.append(name)
            offsets.append(self._offsets[index])
            self._offsets[index] += 0 if token in self._silent else len(name)
            if isinstance(one, int):
                values.append(None)
                tops.append(None)
            else:
                values.append(max(one.logprob, LEAST_LOGPROB))
                top = {self._name(other): max(value, LEAST_LOGPROB) for other, value in one.top}
                tops.append(top | {name: max(one.logprob, LEAST_LOGPROB)})
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _name(self, token: int) -> str:
        data = self._token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            # Parts of a character, which must stay apart.
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class ChatForm:
    """Texts as /v1/chat/completions tells them.

    Args:
        model: name in the answer.
        body: the request.
        token_bytes: what a token writes.
    """

    def __init__(self, model: str, body: ChatRequest, token_bytes: TokenBytes) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._n = body.n or 1
        self._has_logprobs = bool(body.logprobs)
        self._has_tools = bool(body.offered_tools)
        self._readers = [ToolReader() for _ in range(self._n)]
        self._n_calls = [0] * self._n
        self._token_bytes = token_bytes

    def envelope(self, choices: list[dict[str, Any]], is_chunk: bool) -> dict[str, Any]:
        """The body around choices."""
        kind = "chat.completion.chunk" if is_chunk else "chat.completion"
        return self._head | {"object": kind, "choices": choices}

    def first(self) -> list[dict[str, Any]]:
        """Who speaks, for each choice."""
        return [self._delta(i, {"role": "assistant", "content": ""}, None, None) for i in range(self._n)]

    def chunks(self, index: int, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        """The text that is certain since, and then how it ended."""
        text = "".join(piece.step.text for piece in pieces)
        told = (
            [logprobs for piece in pieces for logprobs in piece.step.logprobs] if self._has_logprobs else []
        )
        is_last = pieces[-1].step.is_last
        calls: list[Call] = []
        if self._has_tools:
            text, calls = self._divide(index, text, is_last)
        chunks = [self._delta(index, {"content": text}, self._logprobs(told), None)] if text or told else []
        for call in calls:
            told_call = {"index": self._n_calls[index]} | _told_call(call)
            chunks.append(self._delta(index, {"tool_calls": [told_call]}, None, None))
            self._n_calls[index] += 1
        if is_last:
            reason = self._reason(pieces[-1].step.request, self._n_calls[index])
            chunks.append(self._delta(index, {}, None, reason))
        return chunks

    def whole(self, generations: Sequence[Generation]) -> list[dict[str, Any]]:
        """A choice for each text."""
        choices = []
        for index, generation in enumerate(generations):
            text = generation.text
            calls: list[Call] = []
            if self._has_tools:
                text, calls = self._divide(index, text, is_last=True)
            content = None if calls and not text else text
            message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
            if calls:
                message["tool_calls"] = [_told_call(call) for call in calls]
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._logprobs(generation.logprobs) if self._has_logprobs else None,
                    "finish_reason": self._reason(generation, len(calls)),
                }
            )
        return choices

    def _divide(self, index: int, text: str, is_last: bool) -> tuple[str, list[Call]]:
        text, calls = self._readers[index].push(text)
        if is_last:
            rest, last_calls = self._readers[index].flush()
            return text + rest, calls + last_calls
        return text, calls

    def _reason(self, generation: Generation, n_calls: int) -> str | None:
        # A text that was cut off may have had more to ask.
        return "tool_calls" if n_calls and generation.finish_reason == "stop" else generation.finish_reason

    def _delta(self, index: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.envelope([choice], is_chunk=True)

    def _logprobs(self, told: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        content = [
            self._entry(one.token, one.logprob) | {"top_logprobs": [self._entry(*other) for other in one.top]}
            for one in told
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._token_bytes(token)
        return {
            "token": data.decode(errors="replace"),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(data),
        }


def _told_call(call: Call) -> dict[str, Any]:
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": call._asdict()}

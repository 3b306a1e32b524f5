"""One answer with generated text, whole or streamed: from the reservation of its place to the last byte.

It is a response that does its work while it is sent, so that everything it holds is let go in one place.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from onebit.engine.diversity import repetition
from onebit.engine.engine import Generation
from onebit.serve.forms import Form
from onebit.serve.gate import Record
from onebit.serve.grammar import GrammarError
from onebit.serve.protocol import ApiError, Sampling
from onebit.serve.runner import Job, Piece, Ticket
from onebit.serve.service import Place

Prepare = Callable[[], Awaitable[tuple[Sequence[Job], Form]]]


class Answer(Response):
    """The answer to a request for text.

    Args:
        place: who answers.
        body: the request.
        n: how many texts.
        prepare: makes the texts' jobs and the form of the answer; called once there is room.
    """

    def __init__(self, place: Place, body: Sampling, n: int, prepare: Prepare) -> None:
        super().__init__()
        self._place = place
        self._body = body
        self._n = n
        self._prepare = prepare

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Compute the texts and send them; they end when the client is gone."""
        record: Record = scope["state"]["record"]
        record.model, record.choices = self._place.name, self._n
        runner = self._place.served.runner
        with runner.reserve(self._n):
            jobs, form = await self._prepare()
            n_prompts = self._n // (self._body.n or 1)
            record.prompt_tokens = sum(len(job[0]) for job in jobs[:: self._n // n_prompts])
            ticket = runner.submit(jobs, is_streamed=bool(self._body.stream))
            usage = _Usage(record, scope["state"]["begun_s"])
            with _watched(receive, ticket), usage:
                if self._body.stream:
                    await self._stream(ticket, form, usage, send)
                else:
                    generations = await ticket.outputs()
                    if not ticket.is_cancelled:
                        for generation in generations:
                            usage.take(generation, len(generation.generated))
                            _check(generation)
                        body = form.envelope(form.whole(generations), is_chunk=False)
                        response = JSONResponse(body | {"usage": usage.body(self._body)})
                        await response(scope, receive, send)
            if ticket.is_cancelled:
                record.outcome = record.outcome or "cancelled"

    async def _stream(self, ticket: Ticket, form: Form, usage: "_Usage", send: Send) -> None:
        is_started = False
        try:
            async for data in self._events(ticket, form, usage):
                if not is_started:
                    # Not before the first token: until then an error still has a status of its own.
                    is_started = True
                    headers = [
                        (b"content-type", b"text/event-stream; charset=utf-8"),
                        (b"cache-control", b"no-cache"),
                        # Asks a proxy to pass on each event as it comes.
                        (b"x-accel-buffering", b"no"),
                    ]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": data, "more_body": True})
            if ticket.is_cancelled:
                return
        except ApiError as error:
            if not is_started:
                raise
            usage.record.outcome = error.code or "failed"
            data = _event(error.body)
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self, ticket: Ticket, form: Form, usage: "_Usage") -> AsyncIterator[bytes]:
        has_usage = self._body.includes_usage
        chunks = form.first()
        async for pieces in ticket.pieces():
            for index, group in groupby(sorted(pieces, key=_choice), key=_choice):
                parts = list(group)
                request = parts[-1].step.request
                usage.take(request, len(parts))
                _check(request)
                chunks += form.chunks(index, parts)
            if chunks:
                yield b"".join(_event(chunk | {"usage": None} if has_usage else chunk) for chunk in chunks)
            chunks = []
        if ticket.is_cancelled:
            return
        if has_usage:
            yield _event(form.envelope([], is_chunk=True) | {"usage": usage.body(self._body)})
        yield b"data: [DONE]\n\n"


class _Usage:
    """Counts the tokens of an answer, and says in the end how its texts did."""

    def __init__(self, record: Record, begun_s: float) -> None:
        self.record = record
        self._begun_s = begun_s
        self._generations: set[Generation] = set()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        # Also of a text that its reader gave up: there may have been a reason.
        shares = [share for g in self._generations if (share := repetition(g.generated)) is not None]
        entropies = [entropy for g in self._generations for entropy in g.entropies]
        self.record.repetition = max(shares, default=None)
        self.record.entropy = sum(entropies) / len(entropies) if entropies else None

    def take(self, generation: Generation, n_tokens: int) -> None:
        self.record.completion_tokens += n_tokens
        self._generations.add(generation)
        if self.record.first_token_s is None:
            self.record.first_token_s = (generation.first_token_s or time.perf_counter()) - self._begun_s

    def body(self, request: Sampling) -> dict[str, int]:
        read, written = self.record.prompt_tokens, self.record.completion_tokens
        # The token that an echo alone takes is nobody's.
        written = 0 if request.max_tokens == 0 else written
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _choice(piece: Piece) -> int:
    return piece.choice


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def _check(generation: Generation) -> None:
    """Refuse a text that the engine could not go on with."""
    if generation.finish_reason == "error":
        error = generation.error
        if isinstance(error, GrammarError):
            raise ApiError(400, f"the grammar cannot be followed further: {error}", "invalid_grammar")
        raise ApiError(500, f"the model failed ({type(error).__name__})", "failed")


@contextmanager
def _watched(receive: Receive, ticket: Ticket) -> Iterator[None]:
    """Cancel a ticket whose client is gone, or whose answer ends otherwise."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        ticket.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        ticket.cancel()

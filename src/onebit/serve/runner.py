"""One thread that owns an engine and steps it, and the tickets through which requests get their tokens.

The event loop submits and cancels; the thread takes both before each step, and hands over what a step gave with one
call for all tickets. Nobody waits for a reader: a ticket whose pieces pile up is cancelled.

    runner = Runner(engine, capacity=320, meter=meter)
    runner.start(asyncio.get_running_loop())
    ticket = runner.submit([(tokens, params, NO_ADAPTER)], is_streamed=True)
    async for pieces in ticket.pieces():
        print(*(piece.step.text for piece in pieces), sep="", end="")
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from onebit.engine.engine import Engine, Generation, Step
from onebit.engine.sampling import SamplingParams
from onebit.serve.health import CacheLook
from onebit.serve.protocol import ApiError

if TYPE_CHECKING:
    from onebit.serve.metrics import Meter

# Pieces that may wait for a reader before its texts are cancelled.
MAX_PENDING = 4096
# Longest advice to come back later.
MAX_RETRY_S = 60

T = TypeVar("T")
Job = tuple[Sequence[int], SamplingParams, int]


class Piece(NamedTuple):
    """What one step added to one text of a ticket.

    Args:
        choice: which of the ticket's texts.
        step: the token and its text.
    """

    choice: int
    step: Step


class Ticket:
    """The texts of one request, as the event loop sees them."""

    def __init__(self, runner: "Runner", n: int, is_streamed: bool) -> None:
        self.generations: list[Generation | None] = [None] * n
        self.is_streamed = is_streamed
        self.n_left = n
        self.error: ApiError | None = None
        self.is_cancelled = False
        self._runner = runner
        self._pieces: list[Piece] = []
        self._news = asyncio.Event()

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What came since the last time, until all texts have ended.

        Raises:
            ApiError: the texts were ended from outside.
        """
        while self.n_left or self._pieces or self.error:
            await self._news.wait()
            self._news.clear()
            if self.error:
                raise self.error
            pieces, self._pieces = self._pieces, []
            if pieces:
                yield pieces

    async def outputs(self) -> list[Generation]:
        """All texts, once they have ended.

        Raises:
            ApiError: see `pieces`.
        """
        async for _ in self.pieces():
            pass
        return [generation for generation in self.generations if generation]

    def cancel(self) -> None:
        """End the texts and free their blocks before the next step; nothing happens if all have ended."""
        if self.n_left:
            self.n_left = 0
            self.is_cancelled = True
            self._news.set()
            with suppress(ApiError):
                self._runner.post(lambda: self._runner.drop(self))

    def take(self, piece: Piece) -> None:
        """Add a piece; called on the event loop."""
        if self.error or not self.n_left:
            return
        if piece.step.is_last:
            self.n_left -= 1
            self.generations[piece.choice] = piece.step.request
        self._pieces.append(piece)
        if len(self._pieces) > MAX_PENDING and self.n_left:
            self.cancel()
            self.fail(ApiError(503, "the answer was not read fast enough and has been ended", "slow_reader"))
        elif self.is_streamed or not self.n_left:
            self._news.set()

    def fail(self, error: ApiError) -> None:
        """End with an error; called on the event loop."""
        self.error = self.error or error
        self.n_left = 0
        self._news.set()


class _Live:
    """A text in the engine: whose it is, and when its last token came."""

    __slots__ = ("index", "last_s", "ticket")

    def __init__(self, ticket: Ticket, index: int) -> None:
        self.ticket = ticket
        self.index = index
        self.last_s = 0.0


class Runner:
    """The thread of one engine.

    Args:
        engine: touched by this thread alone from `start` on.
        capacity: texts that may be in flight, waiting ones included; more are refused.
        meter: counts tokens and times.
    """

    def __init__(self, engine: Engine, capacity: int, meter: "Meter") -> None:
        self.engine = engine
        self.capacity = capacity
        self.meter = meter
        self.n_reserved = 0
        self.is_alive = False
        # Called after each step, from when it is there.
        self.cache_look: CacheLook | None = None
        self._mean_s = 1.0
        self._live: dict[Generation, _Live] = {}
        self._inbox: list[Callable[[], None]] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="onebit-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to step; news goes to that loop."""
        self._loop = loop
        self.is_alive = True
        self._thread.start()

    def close(self) -> None:
        """End the thread after its present step."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @contextmanager
    def reserve(self, n: int) -> Iterator[None]:
        """Room for n texts of one request, for as long as it is answered.

        Raises:
            ApiError: the server is full, or n is more than it ever takes.
        """
        if n > self.capacity:
            raise ApiError(
                400, f"the request asks for {n} texts; this server takes {self.capacity} at a time"
            )
        if self.n_reserved + n > self.capacity:
            wait = min(max(round(self._mean_s), 1), MAX_RETRY_S)
            raise ApiError(
                429,
                f"the server is full: {self.n_reserved} of {self.capacity} texts in flight; "
                f"try again in {wait} s",
                "server_full",
                retry_after_s=wait,
            )
        self.n_reserved += n
        begun_s = time.perf_counter()
        try:
            yield
        finally:
            self.n_reserved -= n
            self._mean_s += 0.1 * (time.perf_counter() - begun_s - self._mean_s)

    def submit(self, jobs: Sequence[Job], is_streamed: bool) -> Ticket:
        """Queue the texts of one request.

        Args:
            jobs: prompt tokens, params and adapter of each text.
            is_streamed: the reader wants each token as it comes, not only the whole.
        """
        ticket = Ticket(self, len(jobs), is_streamed)
        self.post(lambda: self._add(ticket, jobs))
        return ticket

    async def call(self, function: Callable[[], T]) -> T:
        """Have the thread call a function between two steps."""
        future: Future[T] = Future()

        def job() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)

        self.post(job)
        return await asyncio.wrap_future(future)

    def abort(self, error: ApiError) -> None:
        """End all texts with an error."""
        self.post(lambda: self._fail(list(self._live), error))

    def post(self, job: Callable[[], None]) -> None:
        """Have the thread do something before its next step.

        Raises:
            ApiError: the thread has ended.
        """
        with self._changed:
            if not self.is_alive:
                raise ApiError(503, "the model has stopped; restart the server", "stopped")
            self._inbox.append(job)
            self._changed.notify()

    def drop(self, ticket: Ticket) -> None:
        """Cancel the texts of a ticket; called on the thread."""
        for request in [request for request, live in self._live.items() if live.ticket is ticket]:
            self.engine.cancel(request)
            del self._live[request]

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while not (self._inbox or self._live or self._closing):
                        self._changed.wait()
                    if self._closing:
                        return
                    inbox, self._inbox = self._inbox, []
                for job in inbox:
                    job()
                if self._live:
                    self._step()
        finally:
            with self._changed:
                self.is_alive = False
            self._fail(list(self._live), ApiError(503, "the model has stopped", "stopped"))

    def _add(self, ticket: Ticket, jobs: Sequence[Job]) -> None:
        try:
            for index, (tokens, params, adapter) in enumerate(jobs):
                self._live[self.engine.add(tokens, params, adapter)] = _Live(ticket, index)
        except Exception as error:
            self.drop(ticket)
            self._tell([(ticket.fail, _as_api_error(error))])

    def _step(self) -> None:
        try:
            steps = self.engine.step()
        except Exception as error:
            # The texts of that step have ended; those that wait go on.
            self.meter.failed_steps.inc()
            lost = [request for request in self._live if request.finish_reason]
            self._fail(lost, ApiError(500, f"the model failed ({type(error).__name__})", "step_failed"))
            return
        now = time.perf_counter()
        if self.cache_look:
            self.cache_look.after_step(now)
        if steps:
            self.meter.batch.observe(len(steps))
            self.meter.tokens.inc(len(steps))
        news: list[tuple[Callable[[Any], None], Any]] = []
        for step in steps:
            live = self._live.get(step.request)
            if live is None:
                continue
            if live.last_s:
                self.meter.interval.observe(now - live.last_s)
            live.last_s = now
            if live.ticket.is_streamed or step.is_last:
                news.append((live.ticket.take, Piece(live.index, step)))
            if step.is_last:
                del self._live[step.request]
        if news:
            self._tell(news)

    def _fail(self, requests: list[Generation], error: ApiError) -> None:
        news: list[tuple[Callable[[Any], None], Any]] = []
        for request in requests:
            if live := self._live.pop(request, None):
                # A request is answered as a whole.
                self.engine.cancel(request)
                self.drop(live.ticket)
                news.append((live.ticket.fail, error))
        self._tell(news)

    def _tell(self, news: list[tuple[Callable[[Any], None], Any]]) -> None:
        # The loop may have ended before the thread.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(_hand_over, news)


def _hand_over(news: list[tuple[Callable[[Any], None], Any]]) -> None:
    for function, value in news:
        function(value)


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ValueError):
        return ApiError(400, str(error))
    return ApiError(500, f"the model failed ({type(error).__name__})", "failed")

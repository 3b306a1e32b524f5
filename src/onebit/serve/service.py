"""Models, each with its engine and thread, under the names that requests call them by.

service = Service({"stories": llm}, Options())
await service.start()
place = service.find("stories")
await service.drain(grace_s=10)
service.close()
"""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from onebit.engine.engine import MAX_STEP_TOKENS, NO_ADAPTER
from onebit.engine.memory import position_bytes
from onebit.engine.model import BLOCK_TOKENS
from onebit.engine.sampling import SamplingParams
from onebit.serve.grammar import Grammar, GrammarError, Vocabulary
from onebit.serve.health import PROBE_EVERY, CacheLook, WeightCheck
from onebit.serve.metrics import Metrics
from onebit.serve.protocol import ApiError
from onebit.serve.runner import Runner

if TYPE_CHECKING:
    from onebit.llm import LLM

# Longest that a grammar may take to be read. What llguidance allows takes less, so this is for what nobody thought of.
GRAMMAR_SECONDS = 10
# Address space, of which only what is used takes memory.
GRAMMAR_STACK_BYTES = 2**30

# Characters or token ids that take less time than another thread to wake up, and so many that they take a moment.
SMALL = 1_000
LARGE = 50_000

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """How much a server takes, and from whom.

    Args:
        max_num_seqs: texts computed at once, for each model.
        max_batched_tokens: most tokens of one forward pass.
        cache_bytes: memory for keys and values, for each model.
        context: most tokens of a text; None: as many as the model and the memory allow.
        max_queue: texts that may wait, beyond those being computed; more are refused with 429.
        max_body_bytes: of a request.
        api_keys: any of them opens the server; none: open to all.
        allow_origins: web pages of others that may use it; "*": all.
        allow_hosts: names without port that requests may call the server by, in lower case; none: any.
        read_s: seconds that a request's body may take to arrive.
        write_s: seconds that a client may take to read what it is sent.
    """

    max_num_seqs: int = 64
    max_batched_tokens: int = MAX_STEP_TOKENS
    cache_bytes: int = 2**30
    context: int | None = None
    max_queue: int = 256
    max_body_bytes: int = 4 * 2**20
    api_keys: Sequence[str] = field(default=(), repr=False)
    allow_origins: Sequence[str] = ()
    allow_hosts: Sequence[str] = ()
    read_s: float = 30.0
    write_s: float = 30.0


def _deep_thread(name: str) -> ThreadPoolExecutor:
    """A thread for what recurses as deep as its input is long: a stack that overflows would end the server."""
    pool = ThreadPoolExecutor(1, name)
    before = threading.stack_size(GRAMMAR_STACK_BYTES)
    try:
        pool.submit(int).result()
    finally:
        threading.stack_size(before)
    return pool


class Served:
    """One model: its engine, the thread that steps it, and what its texts need before and after."""

    def __init__(self, name: str, llm: "LLM", options: Options, metrics: Metrics) -> None:
        self.name = name
        self.llm = llm
        self.created = int(time.time())
        block_bytes = BLOCK_TOKENS * position_bytes(llm.config, llm.kv_cache)
        n_blocks = options.cache_bytes // block_bytes
        if n_blocks < 1:
            raise ValueError(
                f"{options.cache_bytes:,} bytes are too few for keys and values of {name}; "
                f"a block of the cache takes {block_bytes:,}"
            )
        engine = llm.engine(
            n_blocks, max_num_seqs=options.max_num_seqs, max_step_tokens=options.max_batched_tokens
        )
        most = min(llm.config.max_seq_len, engine.pool.n_blocks * BLOCK_TOKENS)
        self.context = min(options.context or most, most)
        capacity = options.max_num_seqs + options.max_queue
        engine.probe_every = PROBE_EVERY
        meter = metrics.meter(name, engine)
        self.runner = Runner(engine, capacity, meter)
        self._cache_look = CacheLook(engine, meter.cache_looked)
        self.weights = WeightCheck(llm.checkpoint, meter.weights_checked, llm.model.adapter_arrays)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The model's tokens as bytes.

        Raises:
            ValueError: the model has no tokenizer, or one that llguidance does not know.
        """
        config, data = self.llm.config, self.llm.checkpoint.tokenizer
        if data is None:
            raise ValueError("this model has no tokenizer, which a grammar needs")
        return Vocabulary(data, config.vocab_size, config.eos_tokens)

    async def warm_up(self) -> None:
        """Run a text of one token and a full step, so that the first user does not wait for pages and buffers."""
        start = next(iter(self.llm.config.eos_tokens), 0)
        params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
        for n in (1, max(1, min(self.context - 1, MAX_STEP_TOKENS))):
            await self.runner.submit([([start] * n, params, NO_ADAPTER)], is_streamed=False).outputs()
        # Not before: what a model sees of one token over and over is no user's text.
        self.runner.cache_look = self._cache_look


class Place(NamedTuple):
    """Where a request goes: a model, and one of its adapters or none."""

    name: str
    served: Served
    adapter: str | None

    @property
    def adapter_index(self) -> int:
        """The adapter as the engine counts them."""
        return NO_ADAPTER if self.adapter is None else self.served.llm.adapters.index(self.adapter)


class Service:
    """All models of a server.

    Args:
        models: by the names that requests call them by.
        options: see `Options`.

    Raises:
        ValueError: no model, names that collide, or options that leave no room.
    """

    def __init__(self, models: Mapping[str, "LLM"], options: Options) -> None:
        if not models:
            raise ValueError("there is no model to serve; give at least one")
        self.options = options
        self.metrics = Metrics()
        self.state = "warming up"
        self.served = [Served(name, llm, options, self.metrics) for name, llm in models.items()]
        self.places: dict[str, Place] = {s.name: Place(s.name, s, None) for s in self.served}
        for served in self.served:
            for adapter in served.llm.adapters:
                place = Place(f"{served.name}:{adapter}", served, adapter)
                # Short names only where they say which model is meant.
                for name in (place.name, adapter):
                    if name in self.places:
                        raise ValueError(f"two models are called {name!r}; give the adapter another name")
                    self.places[name] = place
        # Apart, so that a grammar or a very long text keeps nobody's short text waiting.
        self._quick = ThreadPoolExecutor(2, "onebit-quick")
        self._slow = ThreadPoolExecutor(1, "onebit-slow")
        self._grammar = _deep_thread("onebit-grammar")

    async def start(self) -> None:
        """Start the engines, and run each once."""
        for served in self.served:
            served.runner.start(asyncio.get_running_loop())
            served.weights.start()
        for served in self.served:
            try:
                await served.warm_up()
            except ApiError as error:
                self.state = f"{served.name}: {error.detail}"
                return
        self.state = "ready"

    @property
    def is_draining(self) -> bool:
        """Whether the server takes no more requests."""
        return self.state == "shutting down"

    async def drain(self, grace_s: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """Take no more requests and wait for those that run; after the grace period they end with an error.

        Args:
            grace_s: seconds to wait.
            hurry: whether to wait no longer.
        """
        self.state = "shutting down"
        end_s = time.monotonic() + grace_s
        while any(s.runner.n_reserved for s in self.served) and time.monotonic() < end_s and not hurry():
            await asyncio.sleep(0.05)
        for served in self.served:
            served.runner.abort(ApiError(503, "the server is shutting down", "shutting_down"))

    def close(self) -> None:
        """End the threads."""
        for served in self.served:
            served.runner.close()
            served.weights.close()
        for pool in (self._quick, self._slow, self._grammar):
            pool.shutdown(wait=False, cancel_futures=True)

    def find(self, model: str | None) -> Place:
        """The model of that name; without one, the first.

        Raises:
            ApiError: there is none.
        """
        if model is None:
            return next(iter(self.places.values()))
        if model not in self.places:
            known = ", ".join(place.name for place in self.all_places())
            shown = ascii(model[:100])
            raise ApiError(
                404, f"model {shown} is unknown; this server has {known}", "model_not_found", "model"
            )
        return self.places[model]

    def all_places(self) -> list[Place]:
        """Models and their adapters, each once."""
        return list({place.name: place for place in self.places.values()}.values())

    async def work(self, function: Callable[[], T], size: int | None = None) -> T:
        """Do what would hold up the event loop on another thread.

        Args:
            function: to call.
            size: of what it works on, if known; the small is done at once, the large waits for other large ones and
                for nobody else.
        """
        if size is None:
            size = SMALL + 1
        if size <= SMALL:
            return function()
        pool = self._slow if size > LARGE else self._quick
        return await asyncio.get_running_loop().run_in_executor(pool, function)

    async def compile(self, function: Callable[[], Grammar], param: str) -> Grammar:
        """Read a grammar, within limits.

        Raises:
            ApiError: it is wrong, or more than the limits allow.
        """
        future = asyncio.get_running_loop().run_in_executor(self._grammar, function)
        try:
            return await asyncio.wait_for(future, GRAMMAR_SECONDS)
        except GrammarError as error:
            message = f"{param} cannot be followed: {error}"
        except TimeoutError:
            message = f"{param} takes longer than {GRAMMAR_SECONDS} s to read; simplify it"
        except ValueError as error:
            message = str(error)
        raise ApiError(400, message, "invalid_grammar", param)

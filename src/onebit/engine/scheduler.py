"""Which tokens the next forward pass computes: pure bookkeeping, with no model, clock or thread in it.

There is no prefill phase. Every request has tokens, of which the first n_computed are in the cache, and each
step lets requests catch up in order of arrival. The oldest can always go on, so every request ends. Guesses of
the tokens that follow, drafts, get what room is left in a step and take nothing from anybody.

    scheduler = Scheduler(BlockPool(64, block_tokens=64), max_step_tokens=512)
    scheduler.add(Request([5, 3, 8]))
    scheduler.schedule()                          # [Slice(request, start=0, stop=3, n_drafts=0)]
"""

from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from onebit.engine.blocks import BlockPool


@dataclass(eq=False)
class Request:
    """A text being computed.

    Args:
        tokens: the prompt and what was generated after it.
        n_computed: leading tokens whose keys and values are in the cache.
        blocks: cache blocks, in the order of the positions that they hold.
        drafts: guesses of the tokens that follow, to be computed with the next step if there is room.
    """

    tokens: list[int]
    n_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)


R = TypeVar("R", bound=Request)


class Slice(NamedTuple, Generic[R]):
    """Tokens [start, stop) of a request, to be computed in one step, and the first n_drafts of its drafts."""

    request: R
    start: int
    stop: int
    n_drafts: int = 0

    @property
    def is_last(self) -> bool:
        """Whether the request has then caught up, so that its next token can be drawn."""
        return self.stop == len(self.request.tokens)


Batch = list[Slice[R]]


class Scheduler(Generic[R]):
    """Requests in order of arrival; the earlier one always goes first.

    Args:
        pool: the cache blocks.
        max_step_tokens: most tokens in one step.
    """

    def __init__(self, pool: BlockPool, max_step_tokens: int) -> None:
        assert max_step_tokens > 0
        self.pool = pool
        self.max_step_tokens = max_step_tokens
        self.requests: list[R] = []

    def add(self, request: R) -> None:
        """Queue a request; all its tokens, generated ones included, must fit into the pool."""
        assert request.tokens and not request.blocks and request.n_computed == 0
        self.requests.append(request)

    def remove(self, request: R) -> None:
        """Forget a request and free its blocks."""
        self.requests.remove(request)
        self.pool.release(request.blocks)

    def schedule(self) -> Batch[R]:
        """Choose the next step and reserve its blocks; the caller computes all of it.

        A request gets the blocks for all its present tokens at once, so a long prompt never stalls half-way. When
        blocks run out, the latest arrival gives up its own and is later computed again. Drafts come last, into free
        blocks; they are not counted as computed: whoever accepts them moves n_computed on.

        Returns:
            Slices in order of arrival, at most max_step_tokens tokens together with drafts; empty without requests.
        """
        block_tokens = self.pool.block_tokens
        for request in self.requests:
            if len(request.tokens) <= (len(request.blocks) - 1) * block_tokens:
                self._trim(request)
        batch: Batch[R] = []
        budget = self.max_step_tokens
        for i, request in enumerate(self.requests):
            n_tokens = len(request.tokens)
            has_room = n_tokens <= len(request.blocks) * block_tokens
            if budget == 0 or not (has_room or self._reserve(request, self.requests[i + 1 :])):
                break
            start = request.n_computed
            stop = min(n_tokens, start + budget)
            batch.append(Slice(request, start, stop))
            budget -= stop - start
            request.n_computed = stop
        assert batch or not self.requests
        for i, part in enumerate(batch):
            if budget and part.request.drafts and part.is_last:
                n_drafts = self._reserve_drafts(part.request, budget)
                batch[i] = part._replace(n_drafts=n_drafts)
                budget -= n_drafts
        return batch

    def _trim(self, request: R) -> None:
        """Free the blocks of drafts that were not accepted."""
        n_needed = self.pool.count(len(request.tokens))
        spare = request.blocks[n_needed:]
        del request.blocks[n_needed:]
        self.pool.release(spare)

    def _reserve_drafts(self, request: R, most: int) -> int:
        n_blocks = len(request.blocks) + self.pool.n_free
        room = n_blocks * self.pool.block_tokens - len(request.tokens)
        n_drafts = min(len(request.drafts), most, room)
        missing = self.pool.count(len(request.tokens) + n_drafts) - len(request.blocks)
        request.blocks += self.pool.allocate(missing)
        return n_drafts

    def _reserve(self, request: R, later: list[R]) -> bool:
        missing = self.pool.count(len(request.tokens)) - len(request.blocks)
        # Only a request that is already under way pushes out others: a new one waits for free blocks.
        while missing > self.pool.n_free and later and request.blocks:
            latest = later.pop()
            self.pool.release(latest.blocks)
            latest.n_computed = 0
        if missing > self.pool.n_free:
            return False
        request.blocks += self.pool.allocate(missing)
        return True

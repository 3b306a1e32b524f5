"""Which tokens the next forward pass computes: pure bookkeeping, with no model, clock or thread in it.

There is no prefill phase. Every request has tokens, of which the first n_computed are in the cache, and each
step lets requests catch up in order of arrival. The oldest can always go on, so every request ends. A request begins
only when all before it catch up in the same step, so a text that has begun to grow waits for no prompt. Full blocks
that already hold the first tokens of a request are taken over instead of computed; where the present step fills such a
block, the request begins in the next. Guesses of the tokens that follow,
drafts, get what room is left in a step and take nothing from anybody.

    scheduler = Scheduler(BlockPool(64, block_tokens=64), max_step_tokens=512)
    scheduler.add(Request([5, 3, 8]))
    scheduler.schedule()                          # [Slice(request, start=0, stop=3, n_drafts=0)]
"""

from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from onebit.engine.blocks import ROOT, BlockPool


@dataclass(eq=False)
class Request:
    """A text being computed.

    Args:
        tokens: the prompt and what was generated after it.
        n_computed: leading tokens whose keys and values are in the cache.
        blocks: cache blocks, in the order of the positions that they hold.
        n_shared: leading blocks that others may find; they are full, and not written again.
        drafts: guesses of the tokens that follow, to be computed with the next step if there is room.
        root: requests of different roots share no blocks.
        reads_all: a row of logits is wanted for every token now, so none is taken over.
    """

    tokens: list[int]
    n_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    n_shared: int = 0
    drafts: list[int] = field(default_factory=list)
    root: int = ROOT
    reads_all: bool = False


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
        max_step_rows: most of them of requests that read all.
        max_num_seqs: most requests under way; the others wait. None: as many as the pool holds.
        prefix_cache: take over known blocks.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_step_tokens: int,
        max_step_rows: int | None = None,
        max_num_seqs: int | None = None,
        prefix_cache: bool = True,
    ) -> None:
        assert max_step_tokens > 0 and max_step_rows != 0 and max_num_seqs != 0
        self.pool = pool
        self.max_step_tokens = max_step_tokens
        self.max_step_rows = max_step_rows or max_step_tokens
        self.max_num_seqs = max_num_seqs
        self.prefix_cache = prefix_cache
        self.requests: list[R] = []
        # Tokens of requests when they began or began anew, and how many of these known blocks held; and how often
        # a request gave up its blocks.
        self.n_queried = self.n_found = self.n_preempted = 0

    def add(self, request: R) -> None:
        """Queue a request; all its tokens, generated ones included, must fit into the pool."""
        assert request.tokens and not request.blocks and request.n_computed == 0
        self.requests.append(request)

    def remove(self, request: R) -> None:
        """Forget a request and free its blocks; of what it says is computed, full ones can still be found."""
        self.requests.remove(request)
        self._release(request)

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
            if request.n_computed >= (request.n_shared + 1) * block_tokens:
                self._share(request)
            if len(request.tokens) <= (len(request.blocks) - 1) * block_tokens:
                self._trim(request)
        batch: Batch[R] = []
        budget, rows = self.max_step_tokens, self.max_step_rows
        for i, request in enumerate(self.requests[: self.max_num_seqs]):
            n_tokens = len(request.tokens)
            most = min(budget, rows) if request.reads_all else budget
            has_room = n_tokens <= len(request.blocks) * block_tokens
            if most == 0 or not (has_room or self._reserve(request, self.requests[i + 1 :], batch)):
                break
            start = request.n_computed
            stop = min(n_tokens, start + most)
            batch.append(Slice(request, start, stop))
            budget -= stop - start
            rows -= stop - start if request.reads_all else 0
            request.n_computed = stop
            if stop < n_tokens:
                break
        assert batch or not self.requests
        for i, part in enumerate(batch):
            if budget and part.request.drafts and part.is_last:
                n_drafts = self._reserve_drafts(part.request, budget)
                batch[i] = part._replace(n_drafts=n_drafts)
                budget -= n_drafts
        return batch

    def _share(self, request: R) -> None:
        """Let others find the blocks that have been filled since."""
        if not self.prefix_cache:
            return
        n, blocks = self.pool.block_tokens, request.blocks
        for i in range(request.n_shared, request.n_computed // n):
            before = blocks[i - 1] if i else request.root
            blocks[i] = self.pool.share(blocks[i], before, request.tokens[i * n : (i + 1) * n])
            request.n_shared = i + 1

    def _release(self, request: R) -> None:
        self._share(request)
        self.pool.release(request.blocks)
        request.n_computed = request.n_shared = 0

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

    def _reserve(self, request: R, later: list[R], batch: Batch[R]) -> bool:
        if not request.blocks:
            return self._begin(request, batch)
        missing = self.pool.count(len(request.tokens)) - len(request.blocks)
        # Only a request that is already under way pushes out others: a new one waits for free blocks.
        while missing > self.pool.n_free and later:
            latest = later.pop()
            self.n_preempted += bool(latest.blocks)
            self._release(latest)
        if missing > self.pool.n_free:
            return False
        request.blocks += self.pool.allocate(missing)
        return True

    def _begin(self, request: R, batch: Batch[R]) -> bool:
        """Give a request its first blocks, known ones and free ones; not if the batch fills one that it could know."""
        n_tokens = len(request.tokens)
        # The last token is computed in any case: its logits are wanted.
        is_queried = self.prefix_cache and not request.reads_all
        found = self.pool.find(request.root, request.tokens[: n_tokens - 1]) if is_queried else []
        missing = self.pool.count(n_tokens) - len(found)
        if missing > self.pool.n_free or (is_queried and self._is_filled(request, len(found), batch)):
            self.pool.release(found)
            return False
        request.n_shared = len(found)
        request.n_computed = len(found) * self.pool.block_tokens
        request.blocks = found + self.pool.allocate(missing)
        self.n_queried += n_tokens if is_queried else 0
        self.n_found += request.n_computed
        return True

    def _is_filled(self, request: R, block: int, batch: Batch[R]) -> bool:
        """Whether a batch computes a block of a request, which can then be taken over."""
        begin, end = block * self.pool.block_tokens, (block + 1) * self.pool.block_tokens
        return end < len(request.tokens) and any(
            part.stop >= end
            and part.request.root == request.root
            and part.request.tokens[begin:end] == request.tokens[begin:end]
            and part.request.tokens[:begin] == request.tokens[:begin]
            for part in batch
        )

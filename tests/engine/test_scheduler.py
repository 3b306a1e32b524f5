"""Invariants of scheduling: budget, blocks, order, and that every request ends whatever is preempted."""

import random

from hypothesis import given
from hypothesis import strategies as st

from onebit.engine.blocks import BlockPool
from onebit.engine.scheduler import Request, Scheduler

BLOCK_TOKENS = 4


class Job(Request):
    """A request that ends when it has n_total tokens."""

    def __init__(self, n_prompt, n_total):
        super().__init__([100 + i for i in range(n_prompt)])
        self.n_total = n_total


@st.composite
def workloads(draw):
    """Jobs as (step of arrival, prompt, total), a pool that holds the largest, a token budget, a seed of guesses."""
    jobs = draw(
        st.lists(
            st.tuples(st.integers(0, 10), st.integers(1, 20), st.integers(1, 12)).map(
                lambda job: (job[0], job[1], job[1] + job[2])
            ),
            min_size=1,
            max_size=8,
        )
    )
    largest = -(-max(total - 1 for _, _, total in jobs) // BLOCK_TOKENS)
    n_blocks, budget = draw(st.integers(largest, largest + 6)), draw(st.integers(1, 16))
    return sorted(jobs), n_blocks, budget, draw(st.none() | st.integers(0, 2**32))


def run(jobs, n_blocks, budget, guesses=None, after_step=lambda scheduler, batch: None, kind=Scheduler):
    """Run a workload as an engine would; returns the jobs and the number of steps.

    With a seed of guesses each step offers drafts, of which a random part turns out right.
    """
    rng = random.Random(guesses)
    pool = BlockPool(n_blocks, BLOCK_TOKENS)
    scheduler = kind(pool, budget)
    arrivals = [(step, Job(n_prompt, n_total)) for step, n_prompt, n_total in jobs]
    waiting = list(arrivals)
    steps = 0
    while waiting or scheduler.requests:
        while waiting and (waiting[0][0] <= steps or not scheduler.requests):
            scheduler.add(waiting.pop(0)[1])
        for job in scheduler.requests if guesses is not None else []:
            job.drafts = [0] * rng.randint(0, max(job.n_total - len(job.tokens) - 1, 0))
        batch = scheduler.schedule()
        after_step(scheduler, batch)
        for part in [part for part in batch if part.is_last]:
            job = part.request
            for _ in range(1 + rng.randint(0, part.n_drafts)):
                job.tokens.append(len(job.tokens))
            job.n_computed = len(job.tokens) - 1
            if len(job.tokens) == job.n_total:
                scheduler.remove(job)
        steps += 1
    return [job for _, job in arrivals], steps, pool


@given(workloads())
def test_every_request_ends_with_its_tokens_and_no_block_is_leaked(workload):
    jobs, _, pool = run(*workload)
    assert pool.n_free == pool.n_blocks
    for (_, n_prompt, n_total), job in zip(workload[0], jobs, strict=True):
        assert job.tokens == [100 + i for i in range(n_prompt)] + list(range(n_prompt, n_total))


@given(workloads())
def test_steps_keep_the_budget_and_own_the_blocks_of_what_they_compute(workload):
    _, n_blocks, budget, _ = workload

    def check(scheduler, batch):
        assert 0 < sum(part.stop + part.n_drafts - part.start for part in batch) <= budget
        held = [block for request in scheduler.requests for block in request.blocks]
        assert len(set(held)) == len(held)
        assert len(held) + scheduler.pool.n_free == n_blocks
        for part in batch:
            assert 0 <= part.start < part.stop <= len(part.request.tokens)
            assert part.stop == part.request.n_computed
            assert len(part.request.blocks) * BLOCK_TOKENS >= part.stop + part.n_drafts
            assert 0 <= part.n_drafts <= len(part.request.drafts)

    run(*workload, after_step=check)


@given(workloads())
def test_each_position_is_computed_in_order_and_anew_after_preemption(workload):
    computed = {}

    def check(scheduler, batch):
        for part in batch:
            key = id(part.request)
            # Either the next tokens, after drafts that were right, or all again because the blocks were given up.
            least, most = computed.get(key, (0, 0))
            assert least <= part.start <= most or part.start == 0
            computed[key] = (part.stop, part.stop + part.n_drafts)
        for request in scheduler.requests:
            if not request.blocks:
                assert request.n_computed == 0

    run(*workload, after_step=check)


@given(workloads())
def test_the_oldest_request_goes_on_in_every_step(workload):
    def check(scheduler, batch):
        assert batch[0].request is scheduler.requests[0]
        order = [scheduler.requests.index(part.request) for part in batch]
        assert order == list(range(len(order)))

    run(*workload, after_step=check)


@given(workloads())
def test_drafts_take_nothing_from_anybody(workload):
    """Whatever was computed with drafts would also have been without: they change no other slice."""
    jobs, n_blocks, budget, guesses = workload

    def check(scheduler, batch):
        twin = Scheduler(BlockPool(n_blocks, BLOCK_TOKENS), budget)
        for request in before:
            twin.add(request)
            request.blocks = twin.pool.allocate(request.n_held)
            request.n_computed = request.n_before
        plain = twin.schedule()
        assert [(id(part.request.twin_of), part.start, part.stop) for part in plain] == [
            (id(part.request), part.start, part.stop) for part in batch
        ]

    before = []

    class Watched(Scheduler):
        def schedule(self):
            before[:] = []
            for request in self.requests:
                copy = Request(list(request.tokens))
                copy.twin_of, copy.n_before = request, request.n_computed
                copy.n_held = min(len(request.blocks), self.pool.count(len(request.tokens)))
                before.append(copy)
            return super().schedule()

    run(jobs, n_blocks, budget, guesses, check, Watched)


def test_a_full_pool_preempts_the_latest_arrival():
    pool = BlockPool(3, BLOCK_TOKENS)
    scheduler = Scheduler(pool, 64)
    old, new = Request([1] * 4), Request([2] * 8)
    scheduler.add(old)
    scheduler.add(new)
    assert [part.request for part in scheduler.schedule()] == [old, new]
    old.tokens.append(1)
    new.tokens.append(2)
    assert [part.request for part in scheduler.schedule()] == [old]
    assert (new.blocks, new.n_computed, new.tokens) == ([], 0, [2] * 9)
    scheduler.remove(old)
    assert [(part.start, part.stop) for part in scheduler.schedule()] == [(0, 9)]


def test_a_long_prompt_is_read_in_chunks_beside_running_texts():
    scheduler = Scheduler(BlockPool(32, BLOCK_TOKENS), 8)
    short, long = Request([1]), Request([2] * 20)
    scheduler.add(short)
    scheduler.add(long)
    chunks = []
    for _ in range(3):
        batch = scheduler.schedule()
        chunks.append([part.stop - part.start for part in batch])
        short.tokens.append(1)
    assert chunks == [[1, 7], [1, 7], [1, 6]]

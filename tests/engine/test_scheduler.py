"""Invariants of scheduling: budget, blocks, order, and that every request ends whatever is preempted."""

import random
from collections import Counter
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebit.engine.blocks import ROOT, BlockPool
from onebit.engine.scheduler import Request, Scheduler

BLOCK_TOKENS = 4


class Job(Request):
    """A request that ends when it has n_total tokens; those of kinds 0 to 2 begin with the same tokens."""

    def __init__(self, n_prompt, n_total, kind=0):
        super().__init__([], root=ROOT - 2 * (kind == 3), reads_all=kind == 4)
        self.n_total, self.kind = n_total, kind
        for _ in range(n_prompt):
            self.grow()

    def grow(self):
        i = len(self.tokens)
        self.tokens.append(i if i < 3 * self.kind or self.kind > 2 else 100 + i)


class Memory(Scheduler):
    """Keeps what the blocks hold, and sees that they hold what requests count on."""

    def schedule(self):
        self.memory = getattr(self, "memory", {})
        batch = super().schedule()
        for part in batch:
            assert self.holds(part.request, part.start)
        for request, start, stop, n_drafts in batch:
            written = [*request.tokens[start:stop], *[-1] * n_drafts]
            for i, token in enumerate(written, start):
                place = request.blocks[i // BLOCK_TOKENS], i % BLOCK_TOKENS
                self.memory[place] = (request.root, *request.tokens[:i], token)
        for request in self.requests:
            assert self.holds(request, request.n_computed)
        return batch

    def holds(self, request, n):
        return all(
            self.memory[request.blocks[i // BLOCK_TOKENS], i % BLOCK_TOKENS]
            == (request.root, *request.tokens[: i + 1])
            for i in range(n)
        )


@st.composite
def workloads(draw):
    """Jobs as (step of arrival, prompt, total, kind), and options of run."""
    jobs = draw(
        st.lists(
            st.tuples(st.integers(0, 10), st.integers(1, 20), st.integers(1, 12), st.integers(0, 4)).map(
                lambda job: (job[0], job[1], job[1] + job[2], job[3])
            ),
            min_size=1,
            max_size=8,
        )
    )
    largest = -(-max(total - 1 for _, _, total, _ in jobs) // BLOCK_TOKENS)
    return {
        "jobs": sorted(jobs),
        "n_blocks": draw(st.integers(largest, largest + 6)),
        "budget": draw(st.integers(1, 16)),
        "guesses": draw(st.none() | st.integers(0, 2**32)),
        "max_step_rows": draw(st.integers(1, 16)),
        "max_num_seqs": draw(st.none() | st.integers(1, 4)),
        "prefix_cache": draw(st.booleans()),
    }


def run(jobs, n_blocks, budget, guesses=None, after_step=None, keeps=False, **options):
    """Run a workload as an engine would; returns the jobs, the number of steps, and the pool.

    With a seed of guesses each step offers drafts, of which a random part turns out right. after_step gets the
    scheduler, the batch, and if it is kept the scheduler before it.
    """
    rng = random.Random(guesses)
    pool = BlockPool(n_blocks, BLOCK_TOKENS)
    scheduler = Memory(pool, budget, **options)
    arrivals = [(step, Job(*job)) for step, *job in jobs]
    waiting = list(arrivals)
    steps = 0
    while waiting or scheduler.requests:
        while waiting and (waiting[0][0] <= steps or not scheduler.requests):
            scheduler.add(waiting.pop(0)[1])
        for job in scheduler.requests if guesses is not None else []:
            job.drafts = [0] * rng.randint(0, max(job.n_total - len(job.tokens) - 1, 0))
        before = deepcopy(scheduler) if keeps else None
        batch = scheduler.schedule()
        if after_step:
            after_step(scheduler, batch, before)
        for part in [part for part in batch if part.is_last]:
            job = part.request
            job.reads_all = False
            for n in range(1 + rng.randint(0, part.n_drafts)):
                if n:
                    # A guess that was right is in the cache.
                    place = (
                        job.blocks[(len(job.tokens) - 1) // BLOCK_TOKENS],
                        (len(job.tokens) - 1) % BLOCK_TOKENS,
                    )
                    scheduler.memory[place] = (job.root, *job.tokens)
                job.grow()
            job.n_computed = len(job.tokens) - 1
            if len(job.tokens) == job.n_total:
                scheduler.remove(job)
        steps += 1
    return [job for _, job in arrivals], steps, pool


@given(workloads())
def test_every_request_ends_with_its_tokens_and_no_block_is_leaked(workload):
    jobs, _, pool = run(**workload)
    assert pool.n_free == pool.n_blocks
    for (_, _, n_total, kind), job in zip(workload["jobs"], jobs, strict=True):
        assert job.tokens == Job(n_total, n_total, kind).tokens
        assert (job.n_computed, job.n_shared, job.blocks) == (0, 0, [])


@given(workloads())
def test_steps_keep_the_limits_and_own_the_blocks_of_what_they_compute(workload):
    def check(scheduler, batch, _):
        assert 0 < sum(part.stop + part.n_drafts - part.start for part in batch) <= workload["budget"]
        rows = sum(part.stop - part.start for part in batch if part.request.reads_all)
        assert rows <= workload["max_step_rows"]
        owners = Counter(block for request in scheduler.requests for block in request.blocks)
        written = [block for request in scheduler.requests for block in request.blocks[request.n_shared :]]
        assert all(owners[block] == 1 for block in written)
        assert len(owners) + scheduler.pool.n_free == workload["n_blocks"]
        assert workload["prefix_cache"] or max(owners.values()) == 1
        running = [bool(request.blocks) for request in scheduler.requests]
        assert sum(running) <= (workload["max_num_seqs"] or len(running))
        for part in batch:
            assert 0 <= part.start < part.stop <= len(part.request.tokens)
            assert part.stop == part.request.n_computed
            assert len(part.request.blocks) * BLOCK_TOKENS >= part.stop + part.n_drafts
            assert part.start >= part.request.n_shared * BLOCK_TOKENS
            assert 0 <= part.n_drafts <= len(part.request.drafts)

    run(**workload, after_step=check)


@given(workloads())
def test_each_position_is_computed_in_order_and_anew_after_preemption(workload):
    computed = {}

    def check(scheduler, batch, _):
        for part in batch:
            key = id(part.request)
            # Either the next tokens, after drafts that were right, or all that is not known, once blocks are given up.
            least, most = computed.get(key, (0, 0))
            assert least <= part.start <= most or part.start % BLOCK_TOKENS == 0
            assert least <= part.start <= most or not (part.start and part.request.reads_all)
            computed[key] = (part.stop, part.stop + part.n_drafts)
        for request in scheduler.requests:
            if not request.blocks:
                assert request.n_computed == 0

    run(**workload, after_step=check)


@given(workloads())
def test_the_oldest_request_goes_on_in_every_step(workload):
    def check(scheduler, batch, _):
        assert batch[0].request is scheduler.requests[0]
        order = [scheduler.requests.index(part.request) for part in batch]
        assert order == list(range(len(order)))

    run(**workload, after_step=check)


@given(workloads())
def test_a_text_that_grows_waits_for_memory_alone(workload):
    def check(scheduler, batch, before):
        served = {id(part.request) for part in batch}
        for was, request in zip(before.requests, scheduler.requests, strict=True):
            grows = was.blocks and was.n_computed == len(was.tokens) - 1 and not was.reads_all
            has_room = len(request.blocks) * BLOCK_TOKENS >= len(request.tokens)
            assert not (grows and has_room) or id(request) in served

    run(**workload, after_step=check, keeps=True)


@given(workloads())
def test_drafts_take_nothing_from_anybody(workload):
    """Whatever was computed with drafts would also have been without: they change no other slice."""

    def check(scheduler, batch, twin):
        for request in twin.requests:
            request.drafts = []
        plain = twin.schedule()
        assert [(twin.requests.index(part.request), part.start, part.stop) for part in plain] == [
            (scheduler.requests.index(part.request), part.start, part.stop) for part in batch
        ]

    run(**workload, after_step=check, keeps=True)


@pytest.mark.parametrize(("prefix_cache", "starts"), [(True, [0, 8, 8]), (False, [0, 0, 0])])
def test_known_blocks_are_taken_over_but_for_the_last_token(prefix_cache, starts):
    scheduler = Scheduler(BlockPool(8, BLOCK_TOKENS), 64, prefix_cache=prefix_cache)
    first = []
    for tokens in ([1] * 12, [1] * 12, [1] * 11 + [2] * 9):
        request = Request(tokens)
        scheduler.add(request)
        (part,) = scheduler.schedule()
        first.append(part.start)
        scheduler.remove(request)
    assert first == starts
    assert (scheduler.n_queried, scheduler.n_found) == ((44, 16) if prefix_cache else (0, 0))
    assert scheduler.pool.n_cached == (6 if prefix_cache else 0)


def test_equal_blocks_that_were_computed_twice_become_one():
    scheduler = Scheduler(BlockPool(4, BLOCK_TOKENS), 64)
    a, b = Request([1] * 3), Request([1] * 3)
    scheduler.add(a)
    scheduler.add(b)
    for _ in range(2):
        scheduler.schedule()
        assert a.blocks[0] != b.blocks[0]
        for request in (a, b):
            request.tokens.append(1)
    scheduler.schedule()
    assert a.blocks[0] == b.blocks[0] and a.blocks[1] != b.blocks[1]
    assert scheduler.pool.n_free == 1


def test_copies_wait_for_the_first_to_read_what_they_share():
    scheduler = Scheduler(BlockPool(16, BLOCK_TOKENS), 64)
    copies = [Request([1] * 10) for _ in range(3)]
    partly, other = Request([1] * 5 + [2] * 4), Request([3] * 9)
    for request in (*copies, partly, other):
        scheduler.add(request)
    assert [(part.start, part.stop) for part in scheduler.schedule()] == [(0, 10)]
    copies[0].tokens.append(1)
    # Then they read what is their own; who shares nothing was late by a step.
    batch = scheduler.schedule()
    assert [(part.start, part.stop) for part in batch] == [(10, 11), (8, 10), (8, 10), (4, 9), (0, 9)]
    assert scheduler.n_found == 8 + 8 + 4


@pytest.mark.parametrize(
    ("second", "options"),
    [
        (Request([1] * 4), {}),
        (Request([2] + [1] * 9), {}),
        (Request([1] * 9, root=ROOT - 1), {}),
        (Request([1] * 9, reads_all=True), {}),
        (Request([1] * 9), {"prefix_cache": False}),
    ],
    ids=["no full block", "other tokens", "another root", "reads all", "no prefix cache"],
)
def test_nobody_waits_for_what_he_cannot_take_over(second, options):
    scheduler = Scheduler(BlockPool(16, BLOCK_TOKENS), 64, **options)
    second = deepcopy(second)
    scheduler.add(Request([1] * 9))
    scheduler.add(second)
    assert [part.start for part in scheduler.schedule()] == [0, 0]


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
    # The end of its text went to the older one.
    assert [(part.start, part.stop) for part in scheduler.schedule()] == [(4, 9)]


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

"""Invariant: a cache block is free or has owners, and what is found is what was written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebit.engine.blocks import ROOT, BlockPool

N = 4
TEXTS = st.lists(st.integers(0, 1), max_size=14).map(lambda bits: [7 * bit for bit in bits for _ in (0, 1)])


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([ROOT, ROOT - 1]), TEXTS), max_size=40))
def test_pool_never_loses_a_block_and_finds_what_was_written(actions):
    """Owners come and go; each takes over what is found, writes the rest, and shares all full blocks."""
    pool = BlockPool(8, N)
    owners, written = [], {}
    for action, root, tokens in actions:
        if action < 4 and owners:
            blocks = owners.pop(action % len(owners))
            pool.release(blocks)
            assert blocks == []
        else:
            blocks = pool.find(root, tokens)
            for i, block in enumerate(blocks):
                assert written[block] == (root, *tokens[: (i + 1) * N])
            more = pool.count(len(tokens)) - len(blocks)
            if more > pool.n_free:
                pool.release(blocks)
                continue
            n_found = len(blocks)
            blocks += pool.allocate(more)
            # Without sharing in between two owners may write the same.
            for i in range(n_found, len(tokens) // N):
                assert all(blocks[i] not in other for other in owners)
                written[blocks[i]] = (root, *tokens[: (i + 1) * N])
                before = blocks[i - 1] if i else root
                blocks[i] = pool.share(blocks[i], before, tokens[i * N : (i + 1) * N])
                assert written[blocks[i]] == (root, *tokens[: (i + 1) * N])
            owners.append(blocks)
        held = {block for blocks in owners for block in blocks}
        assert held <= set(range(8))
        assert pool.n_free == 8 - len(held)
        assert pool.n_cached <= pool.n_free
    for blocks in owners:
        pool.release(blocks)
    assert sorted(pool.allocate(8)) == list(range(8))
    assert (pool.n_free, pool.n_cached) == (0, 0)


def test_equal_contents_are_one_block():
    pool = BlockPool(3, N)
    a, b = pool.allocate(2)
    assert pool.share(a, ROOT, [1, 2, 3, 4]) == a
    assert pool.share(b, ROOT, [1, 2, 3, 4]) == a
    assert pool.n_free == 2
    pool.release([a])
    assert pool.n_free == 2
    pool.release([a])
    assert (pool.n_free, pool.n_cached) == (3, 1)


def test_contents_are_known_by_all_that_came_before():
    pool = BlockPool(4, N)
    blocks = pool.allocate(2)
    pool.share(blocks[0], ROOT, [1, 2, 3, 4])
    pool.share(blocks[1], blocks[0], [5, 6, 7, 8])
    assert pool.find(ROOT, [5, 6, 7, 8]) == []
    assert pool.find(ROOT - 1, [1, 2, 3, 4]) == []
    assert pool.find(ROOT, [1, 2, 3, 4, 5, 6, 7]) == blocks[:1]
    assert pool.find(ROOT, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == blocks


def test_the_block_unused_for_longest_goes_first_and_the_end_of_a_text_before_its_beginning():
    pool = BlockPool(3, N)
    text, other = pool.allocate(2), pool.allocate(1)
    pool.share(text[0], ROOT, [1] * N)
    pool.share(text[1], text[0], [1] * N)
    pool.share(other[0], ROOT, [2] * N)
    first, second, third = *text, *other
    pool.release(text)
    pool.release(other)
    assert pool.allocate(2) == [second, first]
    assert pool.find(ROOT, [1] * N) == []
    assert pool.find(ROOT, [2] * N) == [third]


def test_count_rounds_up():
    pool = BlockPool(1, block_tokens=4)
    assert [pool.count(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


def test_allocate_more_than_free_is_refused():
    with pytest.raises(AssertionError):
        BlockPool(2, block_tokens=4).allocate(3)

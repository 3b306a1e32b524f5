"""Invariant: a cache block is free or has one owner."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebit.engine.blocks import BlockPool


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=50))
def test_pool_never_loses_or_doubles_a_block(actions):
    pool = BlockPool(8, block_tokens=4)
    owners = []
    for is_release, n in actions:
        if is_release and owners:
            blocks = owners.pop(n % len(owners))
            pool.release(blocks)
            assert blocks == []
        elif n <= pool.n_free:
            owners.append(pool.allocate(n))
        held = [block for blocks in owners for block in blocks]
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(8))
        assert pool.n_free == 8 - len(held)


def test_count_rounds_up():
    pool = BlockPool(1, block_tokens=4)
    assert [pool.count(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


def test_allocate_more_than_free_is_refused():
    with pytest.raises(AssertionError):
        BlockPool(2, block_tokens=4).allocate(3)

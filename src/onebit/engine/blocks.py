"""Which blocks of the key-value cache are free: policy only, the storage belongs to the core.

Knows nothing of requests.

    pool = BlockPool(n_blocks=8, block_tokens=64)
    blocks = pool.allocate(pool.count(100))      # 2 blocks
    pool.release(blocks)
"""


class BlockPool:
    """Free list of equally long cache blocks; a block is either here or with exactly one owner.

    Args:
        n_blocks: blocks in the cache.
        block_tokens: tokens that one block holds.
    """

    def __init__(self, n_blocks: int, block_tokens: int) -> None:
        assert n_blocks > 0 and block_tokens > 0
        self.n_blocks = n_blocks
        self.block_tokens = block_tokens
        self._free = list(range(n_blocks - 1, -1, -1))

    @property
    def n_free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    def count(self, n_tokens: int) -> int:
        """Blocks that hold n_tokens."""
        return -(-n_tokens // self.block_tokens)

    def allocate(self, n: int) -> list[int]:
        """Take n blocks, which the caller has seen to be free."""
        assert 0 <= n <= self.n_free
        return [self._free.pop() for _ in range(n)]

    def release(self, blocks: list[int]) -> None:
        """Give blocks back and empty the caller's list of them."""
        self._free.extend(reversed(blocks))
        assert len(self._free) <= self.n_blocks
        blocks.clear()

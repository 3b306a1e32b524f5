"""Which blocks of the key-value cache are free, and which hold what: policy only, the storage belongs to the core.

A full block can be shared: whoever has the same tokens from the first on finds it by them. Without owner it stays to be
found until the memory is needed. Knows nothing of requests.

    pool = BlockPool(n_blocks=8, block_tokens=64)
    blocks = pool.allocate(pool.count(100))      # 2 blocks
    blocks[0] = pool.share(blocks[0], ROOT, tokens[:64])
    pool.release(blocks)
    pool.find(ROOT, tokens)                      # [blocks[0]], owned again
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence

# Stands for the block before the first one. Other negative numbers are other roots, which share nothing.
ROOT = -1


class BlockPool:
    """Equally long cache blocks; each is free or has one owner or several.

    Args:
        n_blocks: blocks in the cache.
        block_tokens: tokens that one block holds.
    """

    def __init__(self, n_blocks: int, block_tokens: int) -> None:
        assert n_blocks > 0 and block_tokens > 0
        self.n_blocks = n_blocks
        self.block_tokens = block_tokens
        self._empty = list(range(n_blocks - 1, -1, -1))
        self._n_owners = [0] * n_blocks
        # A block by the one before it and its tokens, and the reverse. An owner of a block owns those before it and
        # gives them back after it: a block is forgotten before the one that it is known by.
        self._known: dict[tuple[int, bytes], int] = {}
        self._keys: dict[int, tuple[int, bytes]] = {}
        # Known blocks without owner, the least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def n_free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._empty) + len(self._idle)

    @property
    def n_cached(self) -> int:
        """Blocks that nobody owns and that can still be found."""
        return len(self._idle)

    def count(self, n_tokens: int) -> int:
        """Blocks that hold n_tokens."""
        return -(-n_tokens // self.block_tokens)

    def allocate(self, n: int) -> list[int]:
        """Take n blocks, which the caller has seen to be free: empty ones, then those unused for longest."""
        assert 0 <= n <= self.n_free
        blocks = []
        for _ in range(n):
            if self._empty:
                block = self._empty.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                del self._known[self._keys.pop(block)]
            self._n_owners[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: list[int]) -> None:
        """Give blocks back and empty the caller's list of them, which is in the order of their tokens."""
        for block in reversed(blocks):
            self._n_owners[block] -= 1
            assert self._n_owners[block] >= 0
            if self._n_owners[block] == 0:
                if block in self._keys:
                    self._idle[block] = None
                else:
                    self._empty.append(block)
        blocks.clear()

    def share(self, block: int, before: int, tokens: Sequence[int]) -> int:
        """Let a full block be found, which will not be written again.

        Args:
            block: owned by the caller.
            before: the shared block of the tokens before, also the caller's, or a root.
            tokens: what the block holds.

        Returns:
            The block to use from now on: where the same is known already, that one, and the other is given back.
        """
        key = before, array("i", tokens).tobytes()
        known = self._known.setdefault(key, block)
        if known == block:
            self._keys[block] = key
        else:
            self._own(known)
            self.release([block])
        return known

    def find(self, root: int, tokens: Sequence[int]) -> list[int]:
        """Become an owner of the known blocks that hold the first of these tokens, as many as there are."""
        blocks: list[int] = []
        before, n = root, self.block_tokens
        for start in range(0, len(tokens) - n + 1, n):
            known = self._known.get((before, array("i", tokens[start : start + n]).tobytes()))
            if known is None:
                break
            self._own(known)
            blocks.append(known)
            before = known
        return blocks

    def _own(self, block: int) -> None:
        if self._n_owners[block] == 0:
            del self._idle[block]
        self._n_owners[block] += 1

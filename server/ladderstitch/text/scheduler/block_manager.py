"""Allocation of KV cache blocks to sequences, their block tables, and the prefix cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

MAX_NAMESPACES = 4096
"""Most namespaces whose cached blocks can be found."""


@dataclass(frozen=True, slots=True)
class BlockKey:
    """The key of a full block: its own tokens, and the id of all that precedes them.

    `parent_id` is the id of the cached block before it, or the id of its namespace if it is the
    first block of a sequence. Keys are compared by value, so two prefixes whose hashes collide are
    never confused.
    """

    parent_id: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prefix:
    """Cached blocks that hold the beginning of a sequence.

    `last_id` is the id of the last of them, or the id of the namespace if there are none.
    """

    blocks: tuple[int, ...]
    last_id: int


class BlockManager:
    """A reference-counted allocator of KV cache blocks 0 to `num_blocks` - 1.

    Every block holds `block_tokens` tokens. A full block may be cached under its key. When its
    last holder releases it, it is free, but keeps its content until the space is needed; the least
    recently used block is evicted first.
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        self.reset()

    def reset(self) -> None:
        """Make every block empty, also those that sequences hold."""
        self._ref_counts = [0] * self.num_blocks
        self._empty = np.ones(self.num_blocks, dtype=bool)  # free, without cached content
        self._evictable: OrderedDict[int, None] = OrderedDict()  # free and cached, oldest first
        self._cached: dict[BlockKey, tuple[int, int]] = {}  # -> block, id
        self._keys: dict[int, BlockKey] = {}
        self._namespaces: dict[object, int] = {}
        self._ids = count()

    @property
    def num_free(self) -> int:
        """The number of blocks without a holder, cached ones included."""
        return int(self._empty.sum()) + len(self._evictable)

    @property
    def num_used(self) -> int:
        """The number of blocks that at least one sequence holds."""
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Return the number of blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_tokens)

    def allocate(self, num_blocks: int, after: int | None = None) -> list[int] | None:
        """Return that many free blocks with one holder each, or None if fewer are free.

        The blocks are the ones that follow block `after` in memory if those are empty.
        """
        if num_blocks > self.num_free:
            return None
        while int(self._empty.sum()) < num_blocks:
            self._evict()
        blocks = self._choose(num_blocks, after)
        for block in blocks:
            self._empty[block] = False
            self._ref_counts[block] = 1
        return blocks

    def share(self, prefix: Prefix) -> None:
        """Add a holder to every block of a prefix."""
        for block in prefix.blocks:
            if not self._ref_counts[block]:
                del self._evictable[block]
            self._ref_counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Remove a holder from every block.

        The later blocks of a sequence will be evicted before its earlier ones.
        """
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            if self._ref_counts[block]:
                continue
            if block in self._keys:
                self._evictable[block] = None
            else:
                self._empty[block] = True

    def namespace(self, key: object) -> int:
        """Return the id of a namespace: sequences share cached blocks within one only.

        The least recently used namespace is dropped when there are more than `MAX_NAMESPACES`. Its
        blocks can no longer be found and are evicted when the space is needed.
        """
        namespace_id = self._namespaces.pop(key, None)
        if namespace_id is None:
            namespace_id = next(self._ids)
            if len(self._namespaces) >= MAX_NAMESPACES:
                del self._namespaces[next(iter(self._namespaces))]
        self._namespaces[key] = namespace_id
        return namespace_id

    def match_prefix(self, namespace_id: int, tokens: Sequence[int]) -> Prefix:
        """Return the longest cached prefix that leaves at least one of the tokens to compute."""
        blocks: list[int] = []
        last_id, size = namespace_id, self.block_tokens
        for start in range(0, len(tokens) - size, size):
            cached = self._cached.get(BlockKey(last_id, tuple(tokens[start : start + size])))
            if cached is None:
                break
            block, last_id = cached
            blocks.append(block)
        return Prefix(tuple(blocks), last_id)

    def cache_block(self, block: int, parent_id: int, tokens: Sequence[int]) -> int:
        """Cache a held block that is full now; return the id that is the parent of the next one.

        A block whose key is already cached stays uncached; the id of the cached one is returned.
        """
        key = BlockKey(parent_id, tuple(tokens))
        if key not in self._cached:
            self._cached[key] = block, next(self._ids)
            self._keys[block] = key
        return self._cached[key][1]

    def reclaim(self, blocks: Sequence[int]) -> bool:
        """Drop held blocks from the prefix cache, so that their holder may overwrite them.

        Return False, and drop none, if one of them has several holders.
        """
        if any(self._ref_counts[block] > 1 for block in blocks):
            return False
        for block in blocks:
            if (key := self._keys.pop(block, None)) is not None:
                del self._cached[key]
        return True

    def clear(self) -> None:
        """Drop all cached content, because the ranks lost it; holders keep their blocks."""
        self._cached.clear()
        self._keys.clear()
        self._namespaces.clear()
        for block in self._evictable:
            self._empty[block] = True
        self._evictable.clear()

    def _evict(self) -> None:
        block, _ = self._evictable.popitem(last=False)
        del self._cached[self._keys.pop(block)]
        self._empty[block] = True

    def _choose(self, num_blocks: int, after: int | None) -> list[int]:
        """Return empty blocks: the ones that follow `after`, else the ones from the widest gaps.

        The widest gap leaves the most contiguous space for the sequence to grow.
        """
        if after is not None:
            following = range(after + 1, after + 1 + num_blocks)
            if self._empty[following.start : following.stop].sum() == num_blocks:
                return list(following)
        empty = np.flatnonzero(self._empty)
        starts = np.flatnonzero(np.diff(empty, prepend=-2) > 1)
        widths = np.diff(starts, append=len(empty))
        chosen: list[int] = []
        for gap in np.argsort(-widths, kind="stable"):
            first = starts[gap]
            chosen += empty[first : first + min(widths[gap], num_blocks - len(chosen))].tolist()
            if len(chosen) == num_blocks:
                break
        return chosen


class BlockTable:
    """The cache blocks of one sequence, which hold the first `num_computed` of its tokens."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.num_computed = 0
        self._last_cached_id = 0
        self._num_cached_blocks = 0
        self._caches = True

    def allocate(
        self,
        manager: BlockManager,
        namespace_id: int,
        tokens: Sequence[int],
        *,
        reuse: bool = True,
    ) -> bool:
        """Allocate blocks for all tokens; return False if too few are free.

        Cached ones come first, unless `reuse` is false.
        """
        prefix = manager.match_prefix(namespace_id, tokens if reuse else ())
        manager.share(prefix)
        num_blocks = manager.blocks_for(len(tokens)) - len(prefix.blocks)
        after = prefix.blocks[-1] if prefix.blocks else None
        allocated = manager.allocate(num_blocks, after=after)
        if allocated is None:
            manager.release(prefix.blocks)
            return False
        self.blocks = [*prefix.blocks, *allocated]
        self.num_computed = len(prefix.blocks) * manager.block_tokens
        self._last_cached_id, self._num_cached_blocks = prefix.last_id, len(prefix.blocks)
        self._caches = True
        return True

    def stop_caching(self) -> None:
        """Cache no block that is filled from now on, until the blocks are allocated again."""
        self._caches = False

    def extend(self, manager: BlockManager, num_tokens: int) -> bool:
        """Allocate one more block if `num_tokens` need it; return False if none is free."""
        if len(self.blocks) >= manager.blocks_for(num_tokens):
            return True
        allocated = manager.allocate(1, after=self.blocks[-1])
        self.blocks += allocated or []
        return allocated is not None

    def mark_computed(self, manager: BlockManager, tokens: Sequence[int], num_tokens: int) -> None:
        """Record that `num_tokens` more tokens are in the blocks, and cache those that are full.

        `tokens` are all tokens of the sequence.
        """
        self.num_computed += num_tokens
        size = manager.block_tokens
        while self._caches and (self._num_cached_blocks + 1) * size <= self.num_computed:
            number = self._num_cached_blocks
            self._last_cached_id = manager.cache_block(
                self.blocks[number],
                self._last_cached_id,
                tokens[number * size : (number + 1) * size],
            )
            self._num_cached_blocks += 1

    def release(self, manager: BlockManager) -> None:
        """Release all blocks; full ones stay cached until the space is needed."""
        manager.release(self.blocks)
        self.blocks, self.num_computed = [], 0

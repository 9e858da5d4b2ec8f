"""The blocks of the ranks' caches: who holds which, and what the free ones still remember."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

MOST_SCOPES = 4096


@dataclass(frozen=True, slots=True)
class BlockKey:
    """What a full block holds: its tokens, after all that the blocks before it hold.

    `before` is the number of a remembered block, or of a scope where a sequence begins. Keys are
    compared whole, so that two prefixes whose hashes collide are never taken for each other.
    """

    before: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prefix:
    """Blocks that hold the beginning of a sequence, and the number of the last of them."""

    blocks: tuple[int, ...]
    last: int


class BlockManager:
    """Blocks 0..blocks-1 of `block_tokens` tokens, counted by their holders.

    A full block may be remembered by its key. When nobody holds it any more it is free, but keeps
    its content until the room is needed, the longest unused first.
    """

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self.blocks, self.block_tokens = blocks, block_tokens
        self._holders = [0] * blocks
        self._blank = np.ones(blocks, dtype=bool)  # free, and nothing worth keeping in it
        self._idle: OrderedDict[int, None] = OrderedDict()  # free and remembered, oldest first
        self._known: dict[BlockKey, tuple[int, int]] = {}  # -> block, number
        self._keys: dict[int, BlockKey] = {}
        self._scopes: dict[object, int] = {}
        self._numbers = count()

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return int(self._blank.sum()) + len(self._idle)

    @property
    def used(self) -> int:
        return self.blocks - self.free

    def needed(self, tokens: int) -> int:
        """Blocks of a sequence of so many tokens."""
        return -(-tokens // self.block_tokens)

    def take(self, number: int, after: int | None = None) -> list[int] | None:
        """Hold so many free blocks, if possible the neighbours of block `after`, in order; None
        if there are not so many."""
        if number > self.free:
            return None
        while int(self._blank.sum()) < number:
            self._evict()
        taken = self._choose(number, after)
        for block in taken:
            self._blank[block] = False
            self._holders[block] = 1
        return taken

    def share(self, prefix: Prefix) -> None:
        """Hold the blocks of a prefix as well."""
        for block in prefix.blocks:
            if not self._holders[block]:
                del self._idle[block]
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Hold these no longer; later blocks of a sequence are forgotten before earlier ones."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._keys:
                self._idle[block] = None
            else:
                self._blank[block] = True

    def scope(self, key: object) -> int:
        """The number that stands before the first block of every sequence of a scope.

        The scope that was unused longest is forgotten when there are too many; its blocks are
        found no more and go as the room is needed.
        """
        number = self._scopes.pop(key, None)
        if number is None:
            number = next(self._numbers)
            if len(self._scopes) >= MOST_SCOPES:
                del self._scopes[next(iter(self._scopes))]
        self._scopes[key] = number
        return number

    def find(self, scope: int, tokens: Sequence[int]) -> Prefix:
        """The longest remembered beginning of a sequence, less than all of it."""
        blocks: list[int] = []
        last, size = scope, self.block_tokens
        for at in range(0, len(tokens) - size, size):
            known = self._known.get(BlockKey(last, tuple(tokens[at : at + size])))
            if known is None:
                break
            block, last = known
            blocks.append(block)
        return Prefix(tuple(blocks), last)

    def remember(self, block: int, before: int, tokens: Sequence[int]) -> int:
        """A held block is full now; the number for what comes after it."""
        key = BlockKey(before, tuple(tokens))
        if key not in self._known:
            self._known[key] = block, next(self._numbers)
            self._keys[block] = key
        return self._known[key][1]

    def forget(self) -> None:
        """What the blocks hold is lost; who holds them still does."""
        self._known.clear()
        self._keys.clear()
        self._scopes.clear()
        for block in self._idle:
            self._blank[block] = True
        self._idle.clear()

    def _evict(self) -> None:
        block, _ = self._idle.popitem(last=False)
        del self._known[self._keys.pop(block)]
        self._blank[block] = True

    def _choose(self, number: int, after: int | None) -> list[int]:
        """Neighbours where there are some; else from the widest gap, which leaves room to grow."""
        if after is not None and self._blank[after + 1 : after + 1 + number].sum() == number:
            return list(range(after + 1, after + 1 + number))
        free = np.flatnonzero(self._blank)
        starts = np.flatnonzero(np.diff(free, prepend=-2) > 1)
        widths = np.diff(starts, append=len(free))
        chosen: list[int] = []
        for gap in np.argsort(-widths, kind="stable"):
            first = starts[gap]
            chosen += free[first : first + min(widths[gap], number - len(chosen))].tolist()
            if len(chosen) == number:
                break
        return chosen

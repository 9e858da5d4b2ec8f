"""Blocks: never held by two who did not share them, none lost, prefixes found exactly."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ladderstitch.text.scheduler import block_manager
from ladderstitch.text.scheduler.block_manager import BlockKey, BlockManager

BLOCKS, SIZE = 12, 2


class Pool(RuleBasedStateMachine):
    """Sequences over an alphabet of two come and go; a plain dictionary says what blocks hold."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockManager(BLOCKS, SIZE)
        self.content: dict[int, tuple[int, ...]] = {}  # block -> all tokens up to its end
        self.held: list[list[int]] = []

    @initialize()
    def begin(self) -> None:
        self.scope = self.pool.scope("everyone")

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def come(self, tokens: list[int]) -> None:
        prefix = self.pool.find(self.scope, tokens)
        for number, block in enumerate(prefix.blocks, 1):
            assert self.content[block] == tuple(tokens[: number * SIZE])
        assert len(prefix.blocks) * SIZE < len(tokens)
        self.pool.share(prefix)
        free = self.pool.free
        fresh = self.pool.take(self.pool.needed(len(tokens)) - len(prefix.blocks))
        if fresh is None:
            assert free < self.pool.needed(len(tokens)) - len(prefix.blocks)
            self.pool.release(prefix.blocks)
            return
        assert not {block for blocks in self.held for block in blocks} & set(fresh)
        blocks, last = [*prefix.blocks, *fresh], prefix.last
        for number in range(len(prefix.blocks), len(tokens) // SIZE):
            end = (number + 1) * SIZE
            self.content[blocks[number]] = tuple(tokens[:end])
            last = self.pool.remember(blocks[number], last, tokens[end - SIZE : end])
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.pool.release(self.held.pop(index))

    @rule()
    def lose_everything(self) -> None:
        self.pool.forget()
        self.scope = self.pool.scope("everyone")
        self.content.clear()

    @invariant()
    def none_is_lost(self) -> None:
        assert self.pool.used == len({block for blocks in self.held for block in blocks})


TestPool = Pool.TestCase


def test_a_prefix_is_found_by_its_own_scope_only() -> None:
    pool = BlockManager(BLOCKS, SIZE)
    mine, others = pool.scope(("path 0", "me")), pool.scope(("path 0", "you"))
    taken = pool.take(2)
    assert taken is not None
    last = pool.remember(taken[0], mine, [1, 2])
    pool.remember(taken[1], last, [3, 4])
    assert pool.find(mine, [1, 2, 3, 4, 5]).blocks == tuple(taken)
    assert pool.find(mine, [1, 2, 3, 4]).blocks == (taken[0],)  # one token is left to compute
    assert pool.find(others, [1, 2, 3, 4, 5]).blocks == ()


def test_prefixes_whose_hashes_collide_are_not_taken_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BlockKey, "__hash__", lambda self: 7)
    pool = BlockManager(BLOCKS, SIZE)
    scope = pool.scope("everyone")
    taken = pool.take(3)
    assert taken is not None
    for block, tokens in zip(taken, ([1, 2], [2, 1], [3, 3]), strict=True):
        pool.remember(block, scope, tokens)
    assert pool.find(scope, [2, 1, 9]).blocks == (taken[1],)
    assert pool.find(scope, [1, 3, 9]).blocks == ()
    assert pool.find(scope, [2, 1, 1, 2, 9]).blocks == (taken[1],)


def test_the_longest_unused_is_forgotten_first() -> None:
    pool = BlockManager(3, SIZE)
    scope = pool.scope("everyone")
    for token in range(3):
        block = pool.take(1)
        assert block is not None
        pool.remember(block[0], scope, [token, token])
        pool.release(block)
    assert pool.free == 3
    assert pool.take(1) is not None
    assert pool.find(scope, [0, 0, 9]).blocks == ()
    assert len(pool.find(scope, [1, 1, 9]).blocks) == 1
    assert pool.take(3) is None


def test_neighbours_are_taken_where_they_are_free() -> None:
    pool = BlockManager(8, SIZE)
    assert pool.take(2) == [0, 1]
    first = pool.take(2, after=1)
    assert first == [2, 3]
    assert pool.take(1, after=1) == [4]


def test_scopes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_manager, "MOST_SCOPES", 2)
    pool = BlockManager(BLOCKS, SIZE)
    held = pool.take(1)
    assert held is not None
    pool.remember(held[0], pool.scope("first"), [1, 2])
    pool.scope("second")
    assert pool.find(pool.scope("first"), [1, 2, 3]).blocks == tuple(held)
    pool.scope("third")  # `second` goes, which was unused longest
    assert pool.find(pool.scope("first"), [1, 2, 3]).blocks == tuple(held)
    pool.scope("fourth")
    pool.scope("fifth")
    assert pool.find(pool.scope("first"), [1, 2, 3]).blocks == ()
    pool.release(held)
    assert pool.free == BLOCKS

"""Tests of `BlockManager`: reference counts, prefix matching and eviction."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ladderstitch.text.scheduler import block_manager
from ladderstitch.text.scheduler.block_manager import BlockKey, BlockManager

NUM_BLOCKS, BLOCK_TOKENS = 12, 2


class BlockManagerModel(RuleBasedStateMachine):
    """Sequences over an alphabet of two, compared with a dictionary of what each block holds."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(NUM_BLOCKS, BLOCK_TOKENS)
        self.content: dict[int, tuple[int, ...]] = {}  # block -> all tokens up to its end
        self.held: list[list[int]] = []

    @initialize()
    def create_namespace(self) -> None:
        self.namespace = self.manager.namespace("everyone")

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def add_sequence(self, tokens: list[int]) -> None:
        prefix = self.manager.match_prefix(self.namespace, tokens)
        for number, block in enumerate(prefix.blocks, 1):
            assert self.content[block] == tuple(tokens[: number * BLOCK_TOKENS])
        assert len(prefix.blocks) * BLOCK_TOKENS < len(tokens)
        self.manager.share(prefix)
        num_free = self.manager.num_free
        num_new = self.manager.blocks_for(len(tokens)) - len(prefix.blocks)
        new = self.manager.allocate(num_new)
        if new is None:
            assert num_free < num_new
            self.manager.release(prefix.blocks)
            return
        assert not {block for blocks in self.held for block in blocks} & set(new)
        blocks, last_id = [*prefix.blocks, *new], prefix.last_id
        for number in range(len(prefix.blocks), len(tokens) // BLOCK_TOKENS):
            end = (number + 1) * BLOCK_TOKENS
            self.content[blocks[number]] = tuple(tokens[:end])
            last_id = self.manager.cache_block(
                blocks[number], last_id, tokens[end - BLOCK_TOKENS : end]
            )
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def remove_sequence(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.manager.release(self.held.pop(index))

    @rule()
    def clear(self) -> None:
        self.manager.clear()
        self.namespace = self.manager.namespace("everyone")
        self.content.clear()

    @invariant()
    def used_blocks_are_held(self) -> None:
        assert self.manager.num_used == len({block for blocks in self.held for block in blocks})


TestBlockManagerModel = BlockManagerModel.TestCase


def test_match_prefix_in_another_namespace_finds_nothing() -> None:
    manager = BlockManager(NUM_BLOCKS, BLOCK_TOKENS)
    mine, other = manager.namespace((0, "me")), manager.namespace((0, "you"))
    blocks = manager.allocate(2)
    assert blocks is not None
    last_id = manager.cache_block(blocks[0], mine, [1, 2])
    manager.cache_block(blocks[1], last_id, [3, 4])
    assert manager.match_prefix(mine, [1, 2, 3, 4, 5]).blocks == tuple(blocks)
    # One token has to be left to compute.
    assert manager.match_prefix(mine, [1, 2, 3, 4]).blocks == (blocks[0],)
    assert manager.match_prefix(other, [1, 2, 3, 4, 5]).blocks == ()


def test_match_prefix_with_colliding_hashes_compares_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BlockKey, "__hash__", lambda self: 7)
    manager = BlockManager(NUM_BLOCKS, BLOCK_TOKENS)
    namespace = manager.namespace("everyone")
    blocks = manager.allocate(3)
    assert blocks is not None
    for block, tokens in zip(blocks, ([1, 2], [2, 1], [3, 3]), strict=True):
        manager.cache_block(block, namespace, tokens)
    assert manager.match_prefix(namespace, [2, 1, 9]).blocks == (blocks[1],)
    assert manager.match_prefix(namespace, [1, 3, 9]).blocks == ()
    assert manager.match_prefix(namespace, [2, 1, 1, 2, 9]).blocks == (blocks[1],)


def test_allocate_without_empty_blocks_evicts_least_recent() -> None:
    manager = BlockManager(3, BLOCK_TOKENS)
    namespace = manager.namespace("everyone")
    for token in range(3):
        block = manager.allocate(1)
        assert block is not None
        manager.cache_block(block[0], namespace, [token, token])
        manager.release(block)
    assert manager.num_free == 3
    assert manager.allocate(1) is not None
    assert manager.match_prefix(namespace, [0, 0, 9]).blocks == ()
    assert len(manager.match_prefix(namespace, [1, 1, 9]).blocks) == 1
    assert manager.allocate(3) is None


def test_allocate_after_a_block_takes_its_neighbours() -> None:
    manager = BlockManager(8, BLOCK_TOKENS)
    assert manager.allocate(2) == [0, 1]
    assert manager.allocate(2, after=1) == [2, 3]
    assert manager.allocate(1, after=1) == [4]


def test_namespace_over_the_limit_drops_least_recent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_manager, "MAX_NAMESPACES", 2)
    manager = BlockManager(NUM_BLOCKS, BLOCK_TOKENS)
    held = manager.allocate(1)
    assert held is not None
    manager.cache_block(held[0], manager.namespace("first"), [1, 2])
    manager.namespace("second")
    assert manager.match_prefix(manager.namespace("first"), [1, 2, 3]).blocks == tuple(held)
    manager.namespace("third")  # drops `second`, the least recently used one
    assert manager.match_prefix(manager.namespace("first"), [1, 2, 3]).blocks == tuple(held)
    manager.namespace("fourth")
    manager.namespace("fifth")
    assert manager.match_prefix(manager.namespace("first"), [1, 2, 3]).blocks == ()
    manager.release(held)
    assert manager.num_free == NUM_BLOCKS

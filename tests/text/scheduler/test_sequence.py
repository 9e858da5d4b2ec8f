"""Tests of the stream of a sequence, whose end frees the sequence, and of its sampler."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import aclosing

import numpy as np
import pytest

from ladderstitch.errors import Draining, ExpiredInCompute, ExpiredInQueue
from ladderstitch.scheduling.generation import GenerationRequest
from ladderstitch.scheduling.sampling import Sampling
from ladderstitch.text.scheduler.block_manager import BlockManager
from ladderstitch.text.scheduler.cache_rules import CacheRules
from ladderstitch.text.scheduler.queue import SequenceQueue
from ladderstitch.text.scheduler.sampler import Sampler
from ladderstitch.text.scheduler.sequence import Sequence
from ladderstitch.text.scheduler.token_stream import TokenStream
from ladderstitch.text.tokenizer import TextTokenizer
from tests.support.language_models import write_tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer.load(write_tiny(tmp_path_factory.mktemp("t")) / "tokenizer.json")


class Harness:
    """One sequence that holds a block, in a queue, with its stream."""

    def __init__(
        self, tokenizer: TextTokenizer, hard_deadline: float = math.inf, *, active: bool = True
    ) -> None:
        self.blocks = BlockManager(4, 4)
        self.queue = SequenceQueue(self.blocks, 1)
        request = GenerationRequest((1, 2), 0.0, max_tokens=2, hard_deadline=hard_deadline)
        self.sequence = Sequence(
            request, 0, ("standard",), None, tokenizer, (), CacheRules.separate(1)
        )
        if active:
            assert self.sequence.allocate_blocks(self.blocks, now=0.0)
            self.queue.active.append(self.sequence)
        else:
            self.queue.add(self.sequence)
        self.stream = TokenStream(self.sequence, self.queue.remove)

    def assert_removed(self) -> None:
        assert self.sequence.ended
        assert self.queue.empty
        assert self.blocks.num_used == 0


async def test_stream_after_last_chunk_stops(tokenizer: TextTokenizer) -> None:
    harness = Harness(tokenizer)
    for token in (65, 66):
        harness.sequence.append_token(token, None, now=1.0)
    chunks = [chunk async for chunk in harness.stream]
    assert [(chunk.token, chunk.finish) for chunk in chunks] == [(65, None), (66, "length")]
    harness.assert_removed()


async def test_stream_closed_early_frees_blocks_and_stops(tokenizer: TextTokenizer) -> None:
    harness = Harness(tokenizer)
    for token in (65, 66):
        harness.sequence.append_token(token, None, now=1.0)
    async with aclosing(harness.stream) as stream:
        assert (await anext(stream)).index == 0
        assert harness.blocks.num_used == 1
    harness.assert_removed()
    assert [chunk async for chunk in harness.stream] == []


async def test_stream_of_failed_sequence_raises_its_error(tokenizer: TextTokenizer) -> None:
    harness = Harness(tokenizer)
    harness.sequence.fail(Draining("stopping"))
    with pytest.raises(Draining, match="stopping"):
        await anext(harness.stream)
    harness.assert_removed()


@pytest.mark.parametrize(("active", "error"), [(True, ExpiredInCompute), (False, ExpiredInQueue)])
async def test_stream_past_hard_deadline_raises(
    tokenizer: TextTokenizer, active: bool, error: type[Exception]
) -> None:
    harness = Harness(tokenizer, hard_deadline=time.monotonic() - 1.0, active=active)
    with pytest.raises(error):
        await anext(harness.stream)
    harness.assert_removed()


async def test_stream_of_cancelled_caller_frees_blocks(tokenizer: TextTokenizer) -> None:
    harness = Harness(tokenizer)
    caller = asyncio.ensure_future(anext(harness.stream))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    harness.assert_removed()


def test_sampler_is_greedy_or_follows_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    assert Sampler(Sampling()).pick(logits) == 0
    sampler = Sampler(Sampling(temperature=1.0, seed=0))
    counts = np.bincount([sampler.pick(logits) for _ in range(4000)], minlength=4) / 4000
    assert np.abs(counts - [0.5, 0.3, 0.15, 0.05]).max() < 0.03


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(temperature=5.0, top_k=2, seed=1), {0, 1}),
        (Sampling(temperature=1.0, top_p=0.79, seed=1), {0, 1}),
        (Sampling(temperature=1.0, top_p=0.81, seed=1), {0, 1, 2}),
        (Sampling(temperature=1.0, top_p=1e-9, seed=1), {0}),
        (Sampling(temperature=1.0, top_k=99, seed=1), {0, 1, 2, 3}),
    ],
)
def test_top_k_and_top_p_keep_only_the_most_likely_tokens(
    sampling: Sampling, allowed: set[int]
) -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(sampling)
    assert {sampler.pick(logits) for _ in range(600)} == allowed

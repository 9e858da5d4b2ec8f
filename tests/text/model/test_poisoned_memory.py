"""No sequence reads what another one, or an earlier owner of its blocks, has left in memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ladderstitch.text.comm.base import SingleRankCommunicator
from ladderstitch.text.messages import LogitsMode, SequenceInput, Step
from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.batch import Batch, find_sequences
from ladderstitch.text.model.residual import ResidualScheme, plan_layers
from ladderstitch.text.model.segments import SegmentedTransformer
from ladderstitch.text.model.shard import Shard
from ladderstitch.text.model.transformer import Transformer
from ladderstitch.text.model.weight_reader import MemoryWeights
from ladderstitch.text.model.weights import load_rank
from tests.support.language_models import TINY, random_tensors

SHARD = Shard.of(TINY, 0, 1)
BLOCK_TOKENS, BLOCKS = 4, 16
BAD = 250
"""A token whose embedding is not finite."""
Model = Transformer | SegmentedTransformer


def make_model(kind: str, bad: float = 1.0) -> tuple[Model, torch.dtype]:
    """Return a model in which the embedding of `BAD` is multiplied by a number."""
    tensors = random_tensors(TINY)
    bits = {"int8": 8, "int4": 4}.get(kind)
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(kind, torch.float32)
    weights = load_rank(MemoryWeights(tensors), TINY, SHARD, dtype=dtype, bits=bits)
    if kind in ("torch", "bfloat16", "float16"):
        assert isinstance(weights.embedding, Tensor)
        spoilt = weights.embedding.clone()  # the head has the same tensor
        spoilt[BAD] *= bad
        return Transformer(TINY, replace(weights, embedding=spoilt), SHARD, 1), dtype
    embedding = tensors["model.embed_tokens.weight"].clone()
    embedding[BAD] *= bad
    return SegmentedTransformer(TINY, weights, 1, lagged=True, embedding=embedding), torch.float32


KINDS = ["torch", "bfloat16", "float16", "segments", "int8", "int4"]
GOOD = (
    ([3, 4, 5, 6, 7, 8, 9], [9, 2, 0]),
    ([200, 7, 7], [5, 6]),
    ([11, 12, 13, 14, 15, 16, 17, 18, 19], [10, 11, 12]),
)
"""Prompts and their blocks, some of which are not adjacent; every prompt leaves slots unwritten."""


def steps_of(prompts: tuple[tuple[list[int], list[int]], ...], *, scattered: bool) -> list[Step]:
    """Return steps of all prompts: a prefill, a chunk with decoding, and decoding."""
    first, second, third = [], [], []
    for number, (tokens, blocks) in enumerate(prompts):
        own = blocks if scattered else [4 * number, 4 * number + 1, 4 * number + 2]
        new = [1, 2] if number == 1 else [1]
        start = len(tokens)
        first.append(SequenceInput(tokens, 0, own, LogitsMode.ALL))
        second.append(SequenceInput(new, start, own, LogitsMode.LAST))
        third.append(SequenceInput([8], start + len(new), own, LogitsMode.LAST))
    return [Step(tuple(part)) for part in (first, second, third)]


def run(
    model: Model,
    dtype: torch.dtype,
    scheme: str,
    steps: list[Step],
    poison: float,
) -> tuple[list[Tensor], list[list[int]]]:
    """Return the logits and the sequences that are not finite, of every step.

    All memory of the cache is filled with a value before the first step.
    """
    cache = PagedCache(TINY, SHARD, BLOCKS, BLOCK_TOKENS, dtype)
    cache._memory.fill_(poison)
    plans = plan_layers(ResidualScheme.model_validate({"scheme": scheme}), TINY.layers, 1)
    logits, non_finite = [], []
    for step in steps:
        batch = Batch(step, BLOCK_TOKENS)
        logits.append(model.forward(batch, cache, plans, SingleRankCommunicator()).float())
        non_finite.append(find_sequences(step.inputs, ~cache.has_finite_slots(batch)))
    return logits, non_finite


@pytest.mark.parametrize("scattered", [True, False])
@pytest.mark.parametrize("scheme", ["standard", "ladder"])
@pytest.mark.parametrize("kind", KINDS)
def test_recycled_blocks_with_nan_change_no_bit(kind: str, scheme: str, scattered: bool) -> None:
    model, dtype = make_model(kind)
    steps = steps_of(GOOD, scattered=scattered)
    expected, _ = run(model, dtype, scheme, steps, 0.0)
    for poison in (float("nan"), float("inf"), -float("inf"), 6e4):
        got, non_finite = run(model, dtype, scheme, steps, poison)
        assert non_finite == [[], [], []]
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("kind", KINDS)
def test_sequence_that_is_not_finite_changes_no_bit_of_others(kind: str, bad: float) -> None:
    """A good sequence is in its place in the expected run, so that the batches have one shape."""
    if kind == "float16":
        bad = min(bad, 6e4) if np.isfinite(bad) else bad
    model, dtype = make_model(kind, bad)
    spoilt = ([1, 2, 3, BAD, 5], [13, 14, 15])
    healthy = ([1, 2, 3, 4, 5], [13, 14, 15])
    expected, _ = run(model, dtype, "standard", steps_of((*GOOD, healthy), scattered=True), 0.0)
    nan = float("nan")
    got, non_finite = run(model, dtype, "standard", steps_of((*GOOD, spoilt), scattered=True), nan)
    if not np.isfinite(bad):
        assert non_finite[0] == [3]
    for ours, theirs in zip(got, expected, strict=True):
        rows = len(theirs) - (5 if len(theirs) > 4 else 1)
        assert torch.equal(ours[:rows], theirs[:rows])


def test_slots_of_each_sequence_are_checked_in_all_layers() -> None:
    steps = steps_of(GOOD, scattered=True)
    batch = Batch(steps[0], BLOCK_TOKENS)
    for layer, part, slot, sequence in ((0, 0, 36, 0), (2, 1, 22, 1), (1, 0, 48, 2)):
        for value in (float("nan"), float("inf"), -float("inf")):
            cache = PagedCache(TINY, SHARD, BLOCKS, BLOCK_TOKENS)
            assert cache.has_finite_slots(batch).all()
            cache._memory[layer, part, slot, 1, 3] = value
            found = find_sequences(steps[0].inputs, ~cache.has_finite_slots(batch))
            assert found == [sequence]
    lone = steps[0].inputs[:1]
    alone = Batch(Step(lone), BLOCK_TOKENS)
    cache = PagedCache(TINY, SHARD, BLOCKS, BLOCK_TOKENS)
    cache._memory[:, :, 11] = float("nan")  # slot 11 is in its blocks, but has no token
    assert find_sequences(lone, ~cache.has_finite_slots(alone)) == []
    cache._memory[1, 1, 10, 0, 0] = float("inf")
    assert find_sequences(lone, ~cache.has_finite_slots(alone)) == [0]

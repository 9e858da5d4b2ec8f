"""Tests of models in segments and of low-bit products, against the same weights in float32."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ladderstitch.runtime.low_bit import LowBitMatrix
from ladderstitch.text.comm.base import SingleRankCommunicator
from ladderstitch.text.messages import LogitsMode, SequenceInput, Step
from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.residual import ResidualScheme, plan_layers
from ladderstitch.text.model.segments import SegmentedTransformer
from ladderstitch.text.model.shard import Shard
from ladderstitch.text.model.transformer import Transformer
from ladderstitch.text.model.weight_reader import MemoryWeights
from ladderstitch.text.model.weights import RankWeights, load_rank
from tests.support.language_models import TINY, random_tensors

SHARD = Shard.of(TINY, 0, 1)
BLOCK_TOKENS = 8
TOKENS = [(5 * n + 3) % 256 for n in range(21)]
SCHEMES = (
    ResidualScheme(),
    ResidualScheme(scheme="ladder"),
    ResidualScheme(scheme="ladder", ladder_layers=(1,)),
)
Model = Transformer | SegmentedTransformer


def low_bit_weights(bits: int) -> RankWeights:
    return load_rank(MemoryWeights(random_tensors(TINY)), TINY, SHARD, bits=bits)


def dequantise(matrix: Tensor | LowBitMatrix) -> Tensor:
    return matrix.dequantise() if isinstance(matrix, LowBitMatrix) else matrix


def float_weights(weights: RankWeights) -> RankWeights:
    """Return the same weights in float32."""
    layers = tuple(
        replace(
            layer,
            qkv=dequantise(layer.qkv),
            output=dequantise(layer.output),
            gate_up=dequantise(layer.gate_up),
            down=dequantise(layer.down),
        )
        for layer in weights.layers
    )
    embedding, head = dequantise(weights.embedding), dequantise(weights.head)
    return RankWeights(embedding, layers, weights.norm, head)


def run(
    model: Model | Sequence[Model],
    scheme: ResidualScheme,
    parts: Sequence[int],
    mode: LogitsMode = LogitsMode.ALL,
) -> Tensor:
    """Return the logits of `TOKENS`, computed in passes of these many tokens, each by its model."""
    cache, at, found = PagedCache(TINY, SHARD, 4, BLOCK_TOKENS), 0, []
    plans = plan_layers(scheme, TINY.layers, 1)
    models = [model] * len(parts) if isinstance(model, Model) else model
    for part, model in zip(parts, models, strict=True):
        sequence = SequenceInput(TOKENS[at : at + part], at, (2, 0, 3), mode)
        batch = Batch(Step((sequence,)), BLOCK_TOKENS)
        found.append(model.forward(batch, cache, plans, SingleRankCommunicator()))
        at += part
    return torch.cat(found)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [4, 8])
def test_segments_equal_float32_up_to_rounded_activations(
    scheme: ResidualScheme, bits: int
) -> None:
    weights = low_bit_weights(bits)
    expected = run(Transformer(TINY, float_weights(weights), SHARD), scheme, [21])
    models = [
        SegmentedTransformer(TINY, weights, 1, lagged=True),
        Transformer(TINY, weights, SHARD),
    ]
    if scheme.scheme == "standard":
        models.append(SegmentedTransformer(TINY, weights, 1, lagged=False))
    for model in models:
        got = run(model, scheme, [21])
        assert got.shape == expected.shape
        assert (got - expected).norm() < 0.08 * expected.norm()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_float32_segments_equal_transformer(scheme: ResidualScheme) -> None:
    weights = load_rank(MemoryWeights(random_tensors(TINY)), TINY, SHARD)
    expected = run(Transformer(TINY, weights, SHARD), scheme, [13, 1, 7])
    lagged = SegmentedTransformer(TINY, weights, 1, lagged=True)
    models = [lagged]
    if scheme.scheme == "standard":
        half = weights.embedding.bfloat16()
        rounded = replace(weights, embedding=half.float(), head=half.float())
        models.append(SegmentedTransformer(TINY, weights, 1, lagged=False))
        given = SegmentedTransformer(TINY, rounded, 1, lagged=False, embedding=half)
        own = run(SegmentedTransformer(TINY, rounded, 1, lagged=False), scheme, [21])
        assert torch.equal(run(given, scheme, [21]), own)
    for model in models:
        got = run(model, scheme, [13, 1, 7])
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_wrong_scheme_is_seen() -> None:
    weights = low_bit_weights(8)
    model = SegmentedTransformer(TINY, weights, 1, lagged=True)
    standard, ladder = (run(model, scheme, [21]) for scheme in SCHEMES[:2])
    assert (standard - ladder).norm() > 0.2 * standard.norm()


@pytest.mark.parametrize("lagged", [True, False])
def test_passes_of_a_few_tokens_equal_one_pass(lagged: bool) -> None:
    model = SegmentedTransformer(TINY, low_bit_weights(8), 1, lagged=lagged)
    whole = run(model, SCHEMES[0], [21])
    # Rounded activations amplify the last digits in which batches of other sizes differ.
    torch.testing.assert_close(run(model, SCHEMES[0], [13, 1, 1, 6]), whole, rtol=0.02, atol=0.2)


def test_precision_may_change_between_tokens() -> None:
    weights = low_bit_weights(8)
    float32 = Transformer(TINY, float_weights(weights), SHARD)
    low_bit = SegmentedTransformer(TINY, weights, 1, lagged=False)
    expected = run(float32, SCHEMES[0], [21])
    switched = run([float32, low_bit, float32], SCHEMES[0], [13, 4, 4])
    assert torch.allclose(switched[:13], expected[:13], rtol=1e-4, atol=1e-4)
    for tokens in (slice(13, 17), slice(17, 21)):
        error = (switched[tokens] - expected[tokens]).norm()
        assert 1e-4 < error / expected[tokens].norm() < 0.08


def test_only_requested_rows_are_returned() -> None:
    model = SegmentedTransformer(TINY, low_bit_weights(8), 1, lagged=False)
    whole = run(model, SCHEMES[0], [21])
    last = run(model, SCHEMES[0], [21], LogitsMode.LAST)
    torch.testing.assert_close(last, whole[-1:], rtol=1e-3, atol=1e-2)


def test_memory_is_that_of_the_bits() -> None:
    float32 = load_rank(MemoryWeights(random_tensors(TINY)), TINY, SHARD).bytes()
    assert low_bit_weights(8).bytes() < 0.4 * float32  # padding included: rows of 48 weights
    assert low_bit_weights(4).bytes() < 0.8 * low_bit_weights(8).bytes()

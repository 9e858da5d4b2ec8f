"""A decoder over ranks, compared token by token with one rank in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch_kernels.decoder import DecoderShape, LayerWeights, random_layers
from ladderstitch_kernels.reference import EPS
from tests.system.kernels.mutants import Mutant
from tests.system.kernels.ranks import DELAY_FACTORS, Delay, RankContext, run_ranks, scale_delays

SHAPE = DecoderShape(layers=2, width=48, heads=4, kv_heads=4, head_dim=8, ffn=44)
ROWS = 2

Scheme = Literal["standard", "ladder"]


def decode(context: RankContext, scheme: Scheme, tokens: int) -> np.ndarray:
    """Decode `tokens` tokens and return this rank's stream after each, [tokens, ROWS, D]."""
    from ladderstitch_kernels import Exchange, SharedMapping
    from ladderstitch_kernels.decoder import Decoder, random_layers, shard_layer

    layers = [
        shard_layer(layer, SHAPE, context.rank, context.ranks)
        for layer in random_layers(SHAPE, 0, torch.float32, "cpu")
    ]
    decoder = Decoder(SHAPE.shard(context.ranks), layers, ROWS, tokens)
    memory = SharedMapping(context.folder, context.rank, context.ranks)
    exchange = Exchange(memory, ROWS, SHAPE.width, torch.float32, columns=32)
    return torch.stack([decoder.step(x, exchange, scheme) for x in inputs(tokens)]).numpy()


def inputs(tokens: int) -> Tensor:
    return torch.randn(tokens, ROWS, SHAPE.width, generator=torch.Generator().manual_seed(7))


def whole_model(scheme: Scheme, tokens: int) -> Tensor:
    """Return the streams by the definition, in float64, [tokens, ROWS, D]."""
    layers = list(random_layers(SHAPE, 0, torch.float32, "cpu"))
    lag = 2 if scheme == "ladder" else 1
    streams = [inputs(tokens).double().transpose(0, 1)] * 2  # x_{-2} and x_{-1}, [B, T, D]
    for layer in layers:
        for block in (attention, mlp):
            streams.append(streams[-1] + block(layer, streams[-lag]))
    return streams[-1].transpose(0, 1)


def attention(layer: LayerWeights, x: Tensor) -> Tensor:
    normed = F.rms_norm(x, x.shape[-1:], layer.attention_norm.double(), EPS)
    d = SHAPE.head_dim
    sizes = (SHAPE.heads * d, SHAPE.kv_heads * d, SHAPE.kv_heads * d)
    q, k, v = (
        part.unflatten(-1, (-1, d)).transpose(1, 2)
        for part in (normed @ layer.qkv.double().T).split(sizes, -1)
    )
    mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
    return mixed.transpose(1, 2).flatten(2) @ layer.output.double().T


def rotate(x: Tensor) -> Tensor:
    """Apply rotary embedding by complex numbers."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(x.shape[-2], dtype=torch.float64), rates)
    rotated = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angles)
    return torch.cat((rotated.real, rotated.imag), -1)


def mlp(layer: LayerWeights, x: Tensor) -> Tensor:
    normed = F.rms_norm(x, x.shape[-1:], layer.ffn_norm.double(), EPS)
    gate, up = (normed @ layer.gate_up.double().T).chunk(2, -1)
    return (F.silu(gate) * up) @ layer.down.double().T


def error(got: np.ndarray, expected: Tensor) -> float:
    return float((torch.from_numpy(got) - expected).abs().max() / expected.abs().max())


def assert_ranks_match(got: list[np.ndarray], expected: Tensor) -> None:
    """Assert that all ranks have the same bits, and that these match to 1e-6."""
    for previous, current in pairwise(got):
        assert np.array_equal(previous, current), "ranks have different bits"
    assert error(got[0], expected) < 1e-6


@pytest.mark.parametrize(
    ("scheme", "ranks", "tokens"),
    [
        ("ladder", 2, 40),
        ("ladder", 4, 12),
        ("standard", 2, 6),
        pytest.param("ladder", 2, 100, marks=pytest.mark.slow),
        pytest.param("ladder", 4, 100, marks=pytest.mark.slow),
    ],
)
def test_decoder_over_ranks_matches_definition(scheme: Scheme, ranks: int, tokens: int) -> None:
    assert_ranks_match(run_ranks(decode, ranks, scheme, tokens), whole_model(scheme, tokens))


def test_ladder_with_three_slots_gives_wrong_results() -> None:
    edits = (
        ("SLOTS = 4", "SLOTS = 3"),
        ("tl.static_assert((SLOTS & (SLOTS - 1)) == 0)", ""),
        ("return epoch & (SLOTS - 1)", "return epoch % SLOTS"),
    )
    late = (Delay("load", ranks=(1,), chance=0.12, seconds=0.25, kernel="wait_add_norm_kernel"),)
    expected, mutant = whole_model("ladder", 3), Mutant("comm/split_phase", edits)
    for factor in DELAY_FACTORS:
        delays = scale_delays(late, factor)
        got = run_ranks(decode, 2, "ladder", 3, delays=delays, mutant=mutant)
        if max(error(part, expected) for part in got) > 1e-3:
            return
    pytest.fail("the planted bug was not detected")


def test_stop_ends_a_wait_without_posts() -> None:
    assert run_ranks(wait_without_post, 2) == [True, True]


def wait_without_post(context: RankContext) -> bool:
    """Collect a reduction that no rank posts; only `stop` can end the wait."""
    import threading

    from ladderstitch_kernels import Exchange, SharedMapping, wait_sum

    memory = SharedMapping(context.folder, context.rank, context.ranks)
    exchange = Exchange(memory, 1, 16, torch.float32, columns=16)
    threading.Timer(0.2, exchange.stop).start()
    return bool(wait_sum(1, exchange).isfinite().all())

"""Tests of low-bit matrices: what they keep of weights, and products against float64."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from ladderstitch.runtime.linear import open_product, store
from ladderstitch.runtime.low_bit import BLOCK, LowBitMatrix, quantise


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [32, 48, 100, 256])
def test_weights_are_within_a_step(bits: int, columns: int) -> None:
    weight = random_weight(24, columns)
    matrix = quantise(weight, bits)
    assert matrix.shape == (24, columns)
    kept = matrix.dequantise()
    assert kept.shape == weight.shape
    blocks = torch.nn.functional.pad(weight, (0, -columns % BLOCK)).reshape(24, -1, BLOCK)
    reach = blocks.amax(-1).clamp(min=0) - blocks.amin(-1).clamp(max=0)
    steps = (reach / (2**bits - 1)).repeat_interleave(BLOCK, 1)[:, :columns]
    # A range that is narrowed to 0.8 of its width clips its largest weights by two steps.
    assert ((kept - weight).abs() <= steps * (2.5 if bits == 4 else 1.0)).all()


def test_four_bits_have_a_smaller_error_than_the_full_range() -> None:
    weight = random_weight(64, 256) ** 3  # heavy tails
    blocks = weight.reshape(64, -1, BLOCK)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    step = (high - low) / 15
    full_range = ((blocks - low) / step).round() * step + low
    ours = quantise(weight, 4).dequantise().reshape(blocks.shape)
    assert (ours - blocks).square().sum() < (full_range - blocks).square().sum()


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1])
def test_weights_of_gguf_files_with_four_bits_are_kept(kind: GGMLQuantizationType) -> None:
    packed = gguf.quants.quantize(random_weight(40, 192, seed=3).numpy(), kind)
    weight = torch.from_numpy(gguf.quants.dequantize(packed, kind).copy())
    assert_kept(weight, offsets=kind == GGMLQuantizationType.Q4_1)


def test_weights_of_q4_k_are_kept() -> None:
    rng = np.random.default_rng(5)
    rows, kind = 16, GGMLQuantizationType.Q4_K
    scales = rng.uniform(0.01, 0.1, (rows, 2)).astype(np.float16).view(np.uint8)
    rest = rng.integers(0, 256, (rows, 140), np.uint8)
    packed = np.concatenate((scales, rest), axis=1)  # one super-block of 256 weights
    weight = torch.from_numpy(gguf.quants.dequantize(packed, kind).copy())
    assert_kept(weight, offsets=True)


def assert_kept(weight: torch.Tensor, *, offsets: bool) -> None:
    """Check that distances within blocks are kept, and offsets to half a step of their 4 bits."""
    matrix = quantise(weight, 4)
    assert matrix.has_offsets == offsets
    blocks = weight.reshape(len(weight), -1, BLOCK)
    errors = matrix.dequantise().reshape(blocks.shape) - blocks
    assert errors.std(-1).max() < 1e-4 * blocks.std(-1).max()
    steps = torch.from_numpy(matrix.scales)
    half = steps[:, blocks.shape[1] :].amax(1) / 2 if offsets else torch.zeros(len(weight))
    assert (errors.abs().amax((1, 2)) < half + 1e-4 * weight.abs().amax(1)).all()
    if offsets and weight.min() < 0 < weight.max():
        assert errors.abs().mean() < steps[:, : blocks.shape[1]].mean() / 30


def test_constant_and_zero_blocks_are_kept() -> None:
    weight = torch.zeros(8, 96)
    weight[:, 32:64] = 0.37
    for bits in (4, 8):
        torch.testing.assert_close(quantise(weight, bits).dequantise(), weight, rtol=0.01, atol=0)


def test_rows_are_those_of_the_matrix() -> None:
    packed = gguf.quants.quantize(random_weight(40, 64).numpy(), GGMLQuantizationType.Q4_1)
    weight = gguf.quants.dequantize(packed, GGMLQuantizationType.Q4_1)
    for matrix in (quantise(random_weight(40, 48), 8), quantise(torch.from_numpy(weight), 4)):
        rows = torch.tensor([7, 0, 39, 7])
        assert torch.equal(matrix.rows(rows), matrix.dequantise()[rows])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [48, 100, 256])
@pytest.mark.parametrize("rows", [1, 5])
def test_product_equals_float64_up_to_rounded_activations(
    bits: int, columns: int, rows: int
) -> None:
    matrix = store(random_weight(33, columns), bits)
    assert isinstance(matrix, LowBitMatrix)
    x = random_weight(rows, columns, seed=1)
    got = open_product(matrix, threads=1)(x)
    assert_close_to_rounded(got, x, matrix)


def test_product_with_offsets_equals_float64_up_to_rounded_activations() -> None:
    packed = gguf.quants.quantize(random_weight(40, 192).numpy() + 1, GGMLQuantizationType.Q4_1)
    weight = torch.from_numpy(gguf.quants.dequantize(packed, GGMLQuantizationType.Q4_1).copy())
    matrix = quantise(weight, 4)
    assert matrix.has_offsets
    x = random_weight(3, 192, seed=2) + 1
    assert_close_to_rounded(open_product(matrix, threads=1)(x), x, matrix)


def assert_close_to_rounded(got: torch.Tensor, x: torch.Tensor, matrix: LowBitMatrix) -> None:
    """Compare with float64; each activation may be off by half a step of its block's 8 bits."""
    weight = matrix.dequantise().double()
    expected = x.double() @ weight.T
    padded = torch.nn.functional.pad(x.double(), (0, -x.shape[1] % BLOCK))
    blocks = padded.reshape(len(x), -1, BLOCK)
    half_step = (blocks.abs().amax(-1) / 127 / 2).repeat_interleave(BLOCK, 1)[:, : x.shape[1]]
    bound = half_step @ weight.abs().T
    assert ((got.double() - expected).abs() <= bound + 1e-4).all()
    assert (got.double() - expected).norm() < 0.02 * expected.norm()


def test_blocks_of_equal_or_positive_weights_need_no_offsets() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = quantise(torch.randn(8, 96, generator=generator), 4).dequantise()
    for row, value in ((3, 0.005), (4, -0.3), (5, 0.0)):
        weights[row, :32] = value
    weights[6, :32] = weights[6, :32].abs()
    matrix = quantise(weights, 4)
    assert not matrix.has_offsets
    torch.testing.assert_close(matrix.dequantise(), weights, atol=1e-6, rtol=0)

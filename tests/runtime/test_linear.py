"""Tests of `serving_linear` against float64, below and above the size at which oneDNN is used."""

import pytest
import torch
from torch import Tensor

from ladderstitch.runtime.linear import ONEDNN_MIN_MACS, serving_linear


@pytest.mark.parametrize("rows", [1, 5, 60])
@pytest.mark.parametrize("with_bias", [True, False])
def test_serving_linear_equals_float64(rows: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, weight, bias = draw(rows, 17, 48), draw(192, 48), draw(192) if with_bias else None
    with torch.inference_mode():
        got = serving_linear(weight)(x, weight, bias)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)


def test_tested_sizes_are_below_and_above_the_threshold() -> None:
    assert 5 * 17 * 48 * 192 < ONEDNN_MIN_MACS < 60 * 17 * 48 * 192


def test_serving_linear_bfloat16_is_torch_linear() -> None:
    weight = torch.ones(2, 3, dtype=torch.bfloat16)
    assert serving_linear(weight) is torch.nn.functional.linear

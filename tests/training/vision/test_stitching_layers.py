"""Tests of least squares against recorded solutions of the reference solver."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from ladderstitch.training.vision.stitching_layers import solve_affine
from tests.conftest import GOLDEN


@pytest.mark.parametrize("case", ["tall", "wide", "square"])
def test_solve_affine_equals_reference(case: str) -> None:
    tensors = load_file(GOLDEN / "lsq_raw.safetensors")
    weight, bias = solve_affine(tensors[f"feature.{case}.x"], tensors[f"feature.{case}.y"])
    for got, name in ((weight, "weight"), (bias, "bias")):
        expected = tensors[f"solution.{case}.{name}"]
        torch.testing.assert_close(got, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)

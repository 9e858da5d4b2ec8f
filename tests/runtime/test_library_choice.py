"""Tests of the choice between the libraries of float32 products."""

from __future__ import annotations

import pytest
import torch

from ladderstitch.runtime.library_choice import ProductTimes, measure_products


@pytest.mark.parametrize(
    ("onnxruntime_s", "torch_s", "chosen"),
    [(1.0, 1.0, "onnxruntime"), (1.19, 1.0, "onnxruntime"), (1.21, 1.0, "torch")],
)
def test_choice_needs_a_clear_gain(onnxruntime_s: float, torch_s: float, chosen: str) -> None:
    times = ProductTimes(onnxruntime_s, torch_s)
    assert times.chosen == chosen
    assert f"products in {chosen}" in times.describe()


def test_measured_times_are_positive() -> None:
    times = measure_products([torch.randn(48, 32) for _ in range(3)], threads=1)
    assert times.onnxruntime_s > 0
    assert times.torch_s > 0

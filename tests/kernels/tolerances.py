"""Tolerances of kernels to their float32 references, relative to the largest element."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCES = {
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,  # the interpreter truncates instead of rounding to bfloat16
}
DTYPES = tuple(TOLERANCES)


def error(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest element; infinite if an element is NaN."""
    if got.shape != expected.shape or got.dtype != expected.dtype or not got.isfinite().all():
        return float("inf")
    if not expected.numel():
        return 0.0
    scale = expected.double().abs().max().clamp(min=1e-6)
    return float((got.double() - expected.double()).abs().max() / scale)


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Assert that the error is within the tolerance of the dtype."""
    assert error(got, expected) <= TOLERANCES[expected.dtype], (
        f"{error(got, expected):.2e} > {TOLERANCES[expected.dtype]:.0e} ({expected.dtype})"
    )

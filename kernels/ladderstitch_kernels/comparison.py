"""A comparison of a kernel with its reference, and the sizes at which `check` compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Limits for the largest difference over the largest element."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One comparison of a kernel with its reference; `error` as of `largest_error`."""

    name: str
    dtype: torch.dtype
    error: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance of the dtype."""
        return self.error <= TOLERANCES[self.dtype]

    def __str__(self) -> str:
        status = "ok" if self.passed else f"FAILED: more than {TOLERANCES[self.dtype]:.1e}"
        kind = str(self.dtype).partition(".")[2]
        return f"{self.name:54}{kind:10}{self.error:9.1e}  {status}"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the inputs; those for a GPU are orders of magnitude larger than `SMALL`."""

    rows: int = 333
    width: int = 8192
    ffn: int = 14336
    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 128
    length: int = 8192


SMALL = Sizes(rows=3, width=48, ffn=80, heads=4, kv_heads=2, head_dim=16, length=40)


def largest_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference over the largest element; infinite if a result is NaN."""
    errors = []
    for a, b in zip(got, expected, strict=True):
        difference = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-9)
        errors.append(difference.nan_to_num(nan=float("inf")).item())
    return max(errors)

"""Kernels run in Triton's interpreter here, which is chosen when triton is imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

VARIABLE = "TRITON_INTERPRET"

_before = os.environ.get(VARIABLE)
os.environ[VARIABLE] = "1"
import ladderstitch_kernels  # noqa: E402, F401  (its functions become interpreted ones here)

if _before is None:
    del os.environ[VARIABLE]


@pytest.fixture(autouse=True, scope="package")
def _interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "1")
        yield


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is NaN, not what a freed tensor left there."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def filled(*args: object, **kwargs: object) -> torch.Tensor:
            return make(*args, **kwargs).fill_(float("nan"))

        return filled

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))

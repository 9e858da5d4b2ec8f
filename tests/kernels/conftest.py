"""Runs the kernels in Triton's interpreter, which is chosen when triton is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.support.interpreted_kernels import VARIABLE


@pytest.fixture(autouse=True, scope="package")
def _interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "1")
        yield


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new tensors with NaN, so that elements which a kernel does not write are detected."""

    def fill_with_nan(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make_filled(*args: object, **kwargs: object) -> torch.Tensor:
            return make(*args, **kwargs).fill_(float("nan"))

        return make_filled

    monkeypatch.setattr(torch, "empty", fill_with_nan(torch.empty))
    monkeypatch.setattr(torch, "empty_like", fill_with_nan(torch.empty_like))

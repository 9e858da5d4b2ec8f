"""Runs the kernels of these tests in the interpreter, as in `tests/kernels`."""

from __future__ import annotations

from tests.kernels.conftest import _interpreter, _poisoned_outputs

__all__ = ["_interpreter", "_poisoned_outputs"]

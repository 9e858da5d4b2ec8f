"""Whether the tensors of a file are those that a model needs."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from ladderstitch.errors import BundleError

MAX_LISTED = 20

Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Return the shape of each tensor by its name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_tensors(expected: Shapes, got: Shapes, *, where: str) -> None:
    """Raise `BundleError` that counts missing, unknown and mis-shaped tensors and names them."""
    problems = [f"missing {name}" for name in expected.keys() - got.keys()]
    problems += [f"unknown {name}" for name in got.keys() - expected.keys()]
    problems += [
        f"{name}: expected {expected[name]}, got {got[name]}"
        for name in expected.keys() & got.keys()
        if expected[name] != got[name]
    ]
    raise_for(problems, where=where)


def raise_for(problems: Collection[str], *, where: str) -> None:
    """Raise `BundleError` that counts the problems and lists the first ones, if there are any."""
    if problems:
        listed = "; ".join(sorted(problems)[:MAX_LISTED])
        raise BundleError(f"{where}: {len(problems)} wrong tensors: {listed}")

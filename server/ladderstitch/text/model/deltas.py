"""What the tensors of one path differ by from those that all paths share.

A safetensors file: for a matrix W [N, K] the factors `W.up` [N, r] and `W.down` [r, K] of what is
added to it; for a vector `W.up` [N] alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ladderstitch.errors import BundleError
from ladderstitch.runtime.tensor_check import raise_for
from ladderstitch.text.model.weight_reader import Weights

UP, DOWN = ".up", ".down"


def load_delta(path: Path) -> dict[str, Tensor]:
    """Raises `BundleError` for a file that is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path}: {error}") from error


def check_delta(delta: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise `BundleError` naming every factor that does not fit the tensors of these shapes."""
    problems = []
    for name in sorted(delta):
        tensor, _, kind = name.rpartition(".")
        shape = tuple(shapes.get(tensor, ()))
        up, down = delta.get(tensor + UP), delta.get(tensor + DOWN)
        if not shape or f".{kind}" not in (UP, DOWN):
            problems.append(f"unknown {name}")
        elif up is None or (len(shape) == 2) != (down is not None):
            problems.append(f"{tensor}: expected `up` and, for a matrix, `down`")
        elif down is None and tuple(up.shape) != shape:
            problems.append(f"{name}: expected {shape}, got {tuple(up.shape)}")
        elif down is not None and (len(up), down.shape[1], up.shape[1]) != (*shape, len(down)):
            problems.append(
                f"{name}: expected factors of {shape}, got {tuple(up.shape)}, {tuple(down.shape)}"
            )
    raise_for(problems, where="delta")


def touched_layers(delta: Mapping[str, Tensor]) -> list[int]:
    """The layers whose tensors it changes."""
    return sorted({int(name.split(".")[2]) for name in delta if name.startswith("model.layers.")})


class DeltaWeights:
    """Shared weights with a path's delta added as they are read."""

    def __init__(self, weights: Weights, delta: Mapping[str, Tensor]) -> None:
        self._weights, self._delta = weights, delta

    def names(self) -> Sequence[str]:
        return self._weights.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(name)

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        shared = self._weights.read(name, rows, columns)
        up, down = self._delta.get(name + UP), self._delta.get(name + DOWN)
        if up is None:
            return shared
        up = up.float() if rows is None else up[rows.start : rows.stop].float()
        if down is None:
            return shared + up.to(shared.dtype)
        down = down.float() if columns is None else down[:, columns.start : columns.stop].float()
        return (shared.float() + up @ down).to(shared.dtype)

"""Where weights come from: files of which each rank reads only its slice, or tensors in memory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ladderstitch.bundles import raise_for
from ladderstitch.errors import BundleError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Weights(Protocol):
    """Named matrices and vectors, of which a part may be read without the rest."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises `BundleError` for a name that is missing."""

    def names(self) -> Sequence[str]:
        """All tensors there are."""

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        """Rows and columns of a tensor, or all of them."""


class MemoryWeights:
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._tensors:
            raise BundleError(f"weights: missing {name}")
        return tuple(self._tensors[name].shape)

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        return self._tensors[name][_cut(rows, columns)]


class RandomWeights:
    """Made-up weights of given shapes, the same on every rank: for benchmarks only."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> None:
        self._shapes, self._seed = shapes, seed

    def names(self) -> Sequence[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        shape = self._shapes[name]
        generator = torch.Generator().manual_seed(self._seed + list(self._shapes).index(name))
        if len(shape) == 1:
            return torch.ones(shape)
        tensor = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        return tensor[_cut(rows, columns)]


class SafetensorsFolder:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` names."""

    def __init__(self, folder: Path) -> None:
        """Raises `BundleError` if a file is missing or unreadable."""
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._where = self._read_index()

    def names(self) -> Sequence[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        part: Tensor = self._slice(name)[_cut(rows, columns)]
        return part

    def _read_index(self) -> dict[str, str]:
        index = self._folder / INDEX
        if not index.exists():
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            return {str(name): str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{index}: expected an object with weight_map: {error}") from error

    def _slice(self, name: str) -> Any:
        if name not in self._where:
            raise BundleError(f"{self._folder}: missing tensor {name}")
        file = self._open(self._where[name])
        with contextlib.suppress(SafetensorError):
            return file.get_slice(name)
        raise BundleError(f"{self._folder / self._where[name]}: missing tensor {name}")

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self._folder / file
            if path.parent != self._folder:
                raise BundleError(f"{self._folder / INDEX}: {file!r} lies outside the folder")
            try:
                self._files[file] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise BundleError(f"{path}: {error}") from error
        return self._files[file]


def _cut(rows: range | None, columns: range | None) -> tuple[slice, ...]:
    cut = tuple(
        slice(part.start, part.stop) if part is not None else slice(None)
        for part in (rows, columns)
    )
    return cut if columns is not None else cut[:1]


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

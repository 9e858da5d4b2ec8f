"""Sources of weights, from which a rank reads only its slices; deltas are LoRA additions.

A delta is a safetensors file with a low-rank (LoRA) addition for some tensors: `NAME.up` [N, r] and
`NAME.down` [r, K] of a matrix [N, K], `NAME.up` [N] alone of a vector. It has no scaling factor.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ladderstitch.bundles import raise_for
from ladderstitch.bundles.files import check_safetensors, read_json
from ladderstitch.errors import BundleError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYERS = "model.layers."
"""The beginning of the names of all layers' tensors."""
MODEL, BASE_PARTS = "model", ("embed_tokens", "layers", "norm")
"""The name of the model without its head in the Hugging Face layout, and its parts."""
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that `torch.compile`, `DataParallel`, FSDP and checkpointing add."""
UP, DOWN = ".up", ".down"
"""Suffixes of the two factors of a delta."""


class Weights(Protocol):
    """Named matrices and vectors, of which parts can be read separately."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; raises `BundleError` if it is missing."""

    def names(self) -> Sequence[str]:
        """Return the names of all tensors."""

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        """Return the given rows and columns of a tensor; unset: all of them."""


class MemoryWeights:
    """Weights that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> Sequence[str]:
        """Return the names of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; raises `BundleError` if it is missing."""
        if name not in self._tensors:
            raise BundleError(f"weights: missing {name}")
        return tuple(self._tensors[name].shape)

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        """Return the given rows and columns of a tensor; unset: all of them."""
        return self._tensors[name][_slices(rows, columns)]


class RandomWeights:
    """Random weights of given shapes, equal on all ranks; for benchmarks only."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> None:
        self._shapes, self._seed = shapes, seed

    def names(self) -> Sequence[str]:
        """Return the names of all tensors."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._shapes[name]

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        """Return rows and columns of a random tensor; vectors are all ones."""
        shape = self._shapes[name]
        generator = torch.Generator().manual_seed(self._seed + list(self._shapes).index(name))
        if len(shape) == 1:
            return torch.ones(shape)[_slices(rows, None)]
        tensor = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        return tensor[_slices(rows, columns)]


class SafetensorsFolder:
    """The weights in `model.safetensors`, or in the shards that the index file names.

    The index is `model.safetensors.index.json`. Tensors may have the names that checkpoints of
    compiled models or of models without a head have; `tied` says that embedding and head are one
    tensor, which may be stored under either name. Raises `BundleError` if a file is missing or
    unreadable.
    """

    def __init__(self, folder: Path, *, tied: bool = False) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._file_of = self._read_index()
        self._stored_names = standard_names(self._file_of, tied=tied, where=folder)

    def names(self) -> Sequence[str]:
        """Return the names of all tensors."""
        return list(self._stored_names)

    @property
    def renamed(self) -> dict[str, str]:
        """The stored names of the tensors that are stored under another name."""
        return {name: stored for name, stored in self._stored_names.items() if name != stored}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; raises `BundleError` if it is missing."""
        return tuple(self._open_tensor(name).get_shape())

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        """Return the given rows and columns of a tensor; unset: all of them."""
        part: Tensor = self._open_tensor(name)[_slices(rows, columns)]
        return part

    def _read_index(self) -> dict[str, str]:
        index = self._folder / INDEX
        if not index.exists():
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        return read_weight_map(index)

    def _open_tensor(self, name: str) -> Any:
        stored = self._stored_names.get(name)
        if stored is None:
            raise BundleError(f"{self._folder}: missing tensor {name}")
        file = self._open(self._file_of[stored])
        with contextlib.suppress(SafetensorError):
            return file.get_slice(stored)
        raise BundleError(f"{self._folder / self._file_of[stored]}: missing tensor {stored}")

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self._folder / file
            check_safetensors(path)
            try:
                self._files[file] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise BundleError(f"{path}: {error}") from error
        return self._files[file]


def read_weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor that the index of shards names.

    Raises `BundleError` if the index is not valid, or if it names a file outside its folder.
    """
    try:
        weight_map = json.loads(read_json(index))["weight_map"]
        found = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{index}: expected an object with weight_map: {error}") from error
    for file in set(found.values()):
        if (index.parent / file).parent != index.parent:
            raise BundleError(f"{index}: {file!r} lies outside the folder")
    return found


def standard_names(stored: Iterable[str], *, tied: bool, where: Path) -> dict[str, str]:
    """Return the stored name of each tensor by its name in the Hugging Face layout.

    `torch.compile` and wrappers of parallel training put prefixes before the names, and models
    that are saved without their head lack `model.`. Raises `BundleError` if two stored names mean
    one tensor.
    """
    found: dict[str, str] = {}
    for name in stored:
        standard = _standard_name(name)
        if (other := found.get(standard)) is not None:
            raise BundleError(f"{where}: expected one tensor {standard}, got {other} and {name}")
        found[standard] = name
    if tied and EMBEDDING not in found and HEAD in found:
        found[EMBEDDING] = found.pop(HEAD)
    return found


def _standard_name(name: str) -> str:
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while parts[1:] and parts[0] == parts[1] == MODEL:
        parts = parts[1:]
    if parts[0] in BASE_PARTS:
        parts = [MODEL, *parts]
    return ".".join(parts)


def _slices(rows: range | None, columns: range | None) -> tuple[slice, ...]:
    both = tuple(
        slice(part.start, part.stop) if part is not None else slice(None)
        for part in (rows, columns)
    )
    return both if columns is not None else both[:1]


def load_delta(path: Path) -> dict[str, Tensor]:
    """Return the factors of a delta file; raises `BundleError` if it is missing or damaged."""
    check_safetensors(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path}: {error}") from error


def check_delta(delta: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise `BundleError` naming every factor that does not fit a tensor of these shapes."""
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
    """Return the layers of which the delta changes a tensor, in order."""
    return sorted({int(name.split(".")[2]) for name in delta if name.startswith(LAYERS)})


class DeltaWeights:
    """Shared weights to which a path's delta (LoRA) is added when they are read."""

    def __init__(self, weights: Weights, delta: Mapping[str, Tensor]) -> None:
        self._weights, self._delta = weights, delta

    def names(self) -> Sequence[str]:
        """Return the names of all tensors."""
        return self._weights.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._weights.shape(name)

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        """Return rows and columns of a tensor; with a delta, in float32.

        A sum that is rounded to the dtype of the file would lose much of a small delta.
        """
        shared = self._weights.read(name, rows, columns)
        up, down = self._delta.get(name + UP), self._delta.get(name + DOWN)
        if up is None:
            return shared
        up = up.float() if rows is None else up[rows.start : rows.stop].float()
        if down is None:
            return shared.float() + up
        down = down.float() if columns is None else down[:, columns.start : columns.stop].float()
        return shared.float() + up @ down

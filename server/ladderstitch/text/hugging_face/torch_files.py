"""Weights in `pytorch_model.bin`, in one file or in shards, read without running their code."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ladderstitch.errors import BundleError
from ladderstitch.text.model.weight_reader import MemoryWeights, read_weight_map, standard_names

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


class TorchFolder:
    """The weights in `pytorch_model.bin`, or in the shards that its index names.

    Files are mapped into memory. Only tensors are unpickled, by torch's restricted loader; a file
    that asks for anything else is refused. `tied` is as in `SafetensorsFolder`.
    """

    def __init__(self, folder: Path, *, tied: bool = False) -> None:
        """Open all files; raises `BundleError` if one is missing, unreadable or not allowed."""
        stored: dict[str, Tensor] = {}
        index = folder / INDEX
        files = sorted(set(read_weight_map(index).values())) if index.exists() else [SINGLE]
        for file in files:
            stored |= self._load(folder / file)
        names = standard_names(stored, tied=tied, where=folder)
        self._weights = MemoryWeights({name: stored[other] for name, other in names.items()})
        self.renamed = {name: other for name, other in names.items() if name != other}

    def names(self) -> Sequence[str]:
        """Return the names of all tensors."""
        return self._weights.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; raises `BundleError` if it is missing."""
        return self._weights.shape(name)

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        """Return the given rows and columns of a tensor; unset: all of them."""
        return self._weights.read(name, rows, columns)

    def _load(self, file: Path) -> Mapping[str, Tensor]:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, ValueError, EOFError) as error:
            reason = str(error).partition("\n")[0]
            raise BundleError(f"{file}: expected a file with tensors only: {reason}") from error
        if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
            raise BundleError(f"{file}: expected tensors by name, got {type(loaded).__name__}")
        return loaded

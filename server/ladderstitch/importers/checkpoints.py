"""Reads weights from files that others wrote, without running anything that such a file may hold.

Pickled files go through torch's restricted unpickler: tensors and containers load; configuration
objects that training scripts leave beside the weights become inert placeholders, whose classes are
never imported; a file that names anything else is refused.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import safe_globals

from ladderstitch.errors import DataError

DATA_CLASSES = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)
"""What training scripts are known to pickle beside their weights, and that only holds data."""

DICTIONARIES = ("yacs.config.CfgNode", "easydict.EasyDict", "addict.addict.Dict")
"""The same, but pickled item by item: read as plain dictionaries."""

CONTAINERS = ("model", "state_dict", "model_state_dict", "module")
"""Keys under which checkpoints hold their weights, in the order they are looked for."""


class Placeholder:
    """Stands for an object of a class that is not imported; keeps nothing of it."""

    def __new__(cls, *_args: object, **_kwargs: object) -> Placeholder:
        return super().__new__(cls)

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        """Whatever the file says about it is dropped."""

    def __setstate__(self, _state: object) -> None:
        """Likewise."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name from `.safetensors`, or from a `.pth`, `.pt` or `.bin` file or its `model` or
    `state_dict` entry. Raises `DataError` for a file that is none, or that would run code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        inert: list[Any] = [(Placeholder, name) for name in DATA_CLASSES]
        inert += [(OrderedDict, name) for name in DICTIONARIES]
        with safe_globals(inert):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no checkpoint may end the unpickler in any way
        raise DataError(f"{path}: {_reason(str(error))}") from error
    tensors = _weights_in(loaded)
    if not tensors:
        raise DataError(f"{path}: expected tensors, alone or under one of {list(CONTAINERS)}")
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _reason(message: str) -> str:
    """The unpickler explains at length how to be less careful; one line of it is the cause."""
    if found := re.search(r"GLOBAL (\S+)", message):
        return (
            f"refused, since loading it would call {found[1]}; "
            "save its state dict alone, or as safetensors"
        )
    return f"not a readable checkpoint ({message.partition(chr(10))[0]})"


def _weights_in(loaded: Any) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping):
        return {}
    for key in CONTAINERS:
        if isinstance(loaded.get(key), Mapping):
            return _weights_in(loaded[key])
    return {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)}

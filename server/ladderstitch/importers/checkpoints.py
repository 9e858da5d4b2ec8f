"""Weights from checkpoint files of other projects, read without running code from the file.

Pickled files go through torch's restricted unpickler, which loads tensors and containers.
Configuration objects that training scripts store next to the weights become inert placeholders;
their classes are never imported. A file that names any other class is rejected.
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
"""Classes of data objects that training scripts are known to pickle next to their weights."""

DICTIONARY_CLASSES = (
    "yacs.config.CfgNode",
    "easydict.EasyDict",
    "addict.addict.Dict",
    "utils.config.AttrDict",
    "utils.config.Config",
)
"""Classes of data objects that are pickled item by item; they are read as dictionaries."""

WEIGHT_KEYS = ("model", "state_dict", "model_state_dict", "module")
"""Keys under which checkpoints store their weights, in the order in which they are tried."""


class Placeholder:
    """A substitute for an object whose class is not imported; it stores nothing."""

    def __new__(cls, *_args: object, **_kwargs: object) -> Placeholder:
        """Ignore the arguments of the pickled constructor call."""
        return super().__new__(cls)

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        """Ignore the arguments of the pickled constructor call."""

    def __setstate__(self, _state: object) -> None:
        """Ignore the object's state in the file."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name.

    The file is `.safetensors`, or a pickled `.pth`, `.pt` or `.bin` with the tensors at its top or
    under one of `WEIGHT_KEYS`. Raises `DataError` if it is not a checkpoint or would run code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        inert: list[Any] = [(Placeholder, name) for name in DATA_CLASSES]
        inert += [(OrderedDict, name) for name in DICTIONARY_CLASSES]
        with safe_globals(inert):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no checkpoint may end the unpickler in any way
        raise DataError(f"{path}: {_explain(str(error))}") from error
    tensors = _find_tensors(loaded)
    if not tensors:
        raise DataError(f"{path}: expected tensors, alone or under one of {list(WEIGHT_KEYS)}")
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _explain(message: str) -> str:
    """Return the cause of an unpickler's error, without its advice on how to be less careful."""
    if found := re.search(r"GLOBAL (\S+)", message):
        return (
            f"rejected, since loading it would call {found[1]}; "
            "save its state dict alone, or as safetensors"
        )
    return f"not a readable checkpoint ({message.partition(chr(10))[0]})"


def _find_tensors(loaded: Any) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping):
        return {}
    for key in WEIGHT_KEYS:
        if isinstance(loaded.get(key), Mapping):
            return _find_tensors(loaded[key])
    return {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)}

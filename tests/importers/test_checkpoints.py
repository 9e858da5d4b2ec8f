"""Tests of reading foreign checkpoints: weights are read, no code of the file is run."""

from __future__ import annotations

import argparse
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ladderstitch.errors import DataError
from ladderstitch.importers.checkpoints import read_weights

WEIGHTS = {"a.weight": torch.arange(4.0), "b": torch.tensor(3)}


def configuration(module: str) -> object:
    """Return an object of a class that is not installed: a dictionary with attributes."""
    node = type("CfgNode", (dict,), {"__module__": module})
    for name in (module.partition(".")[0], module):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[module].CfgNode = node  # type: ignore[attr-defined]  # created for the test
    made = node(LEARNING_RATE=0.1, NESTED=node(DEPTH=3))
    made.__dict__["_immutable"] = True
    return made


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "wrapped",
    [
        lambda: WEIGHTS,
        lambda: {"state_dict": {f"module.{k}": v for k, v in WEIGHTS.items()}, "epoch": 3},
        lambda: {
            "model": WEIGHTS,
            "args": argparse.Namespace(lr=0.1, more=argparse.Namespace(depth=3)),
            "best": np.float64(0.9),
            "output": Path("/runs"),
        },
        lambda: {"model": WEIGHTS, "config": configuration("yacs.config")},
    ],
    ids=["plain", "state_dict", "namespace", "yacs"],
)
def test_read_weights_ignores_other_objects_in_the_file(
    tmp_path: Path, wrapped: Callable[[], object], zipped: bool
) -> None:
    try:
        torch.save(wrapped(), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    finally:
        for name in ("yacs.config", "yacs"):
            sys.modules.pop(name, None)
    read = read_weights(tmp_path / "x.pth")
    assert read.keys() == WEIGHTS.keys()
    assert all(torch.equal(read[name], WEIGHTS[name]) for name in WEIGHTS)
    assert "yacs.config" not in sys.modules


class Trap:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("function", [os.mkdir, eval, exec, __import__, Path.mkdir])
def test_checkpoint_that_would_run_code_raises_and_runs_none(
    tmp_path: Path, function: Callable[..., object], zipped: bool
) -> None:
    target = tmp_path / "ran"
    code = f"open({str(target)!r}, 'w')"
    trap = Trap(function, str(target) if function in (os.mkdir, Path.mkdir) else code)
    payload = {"model": WEIGHTS, "extra": trap}
    torch.save(payload, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError, match="rejected, since loading it would call"):
        read_weights(tmp_path / "x.pth")
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02}q\x00.", b"PK\x03\x04"])
def test_read_weights_of_another_format_raises(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(DataError, match=r"x.pth: (not a readable checkpoint|expected tensors)"):
        read_weights(tmp_path / "x.pth")
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"x.safetensors: not a readable checkpoint"):
        read_weights(tmp_path / "x.safetensors")

"""Model bundles: those that ship with the package, where fetched ones are kept, tensor checks."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import yaml

from ladderstitch.errors import BundleError

if TYPE_CHECKING:
    from torch import Tensor

HOME_VARIABLE = "LADDERSTITCH_HOME"
EMBEDDED_FOLDER = Path(__file__).parent
EMBEDDED = EMBEDDED_FOLDER / "fashion-mnist"
"""The model that `serve` serves when none is named."""
LANGUAGE_FAMILY: Final = "llama"
"""`family` in the `model.yaml` of a language model."""


def models_home() -> Path:
    """The folder that fetched bundles go to: LADDERSTITCH_HOME, or the user's data folder."""
    if home := os.environ.get(HOME_VARIABLE):
        return Path(home)
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "ladderstitch"


def find_bundle(name: str) -> Path:
    """The bundle of that name, or at that path. Raises `BundleError` that says what there is."""
    folders = (models_home(), EMBEDDED_FOLDER)
    for path in (Path(name), *(folder / name for folder in folders)):
        if (path / "model.yaml").is_file():
            return path
    known = sorted({p.parent.name for folder in folders for p in folder.glob("*/model.yaml")})
    raise BundleError(
        f"model: no bundle {name!r}; there are {', '.join(known) or 'none'}; "
        "`ladderstitch fetch --help` lists more"
    )


def is_language_bundle(path: Path) -> bool:
    """Whether a bundle's `model.yaml` names this family; raises `BundleError` if unreadable."""
    try:
        raw = yaml.safe_load((path / "model.yaml").read_text())
    except (OSError, yaml.YAMLError) as error:
        raise BundleError(f"{path / 'model.yaml'}: {error}") from error
    return isinstance(raw, dict) and raw.get("family") == LANGUAGE_FAMILY


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

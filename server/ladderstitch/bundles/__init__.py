"""Where model bundles are found, the kind of a bundle, and checks of its tensors."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ladderstitch.bundles.files import read_yaml
from ladderstitch.errors import BundleError, shorten

if TYPE_CHECKING:
    from torch import Tensor

HOME_VARIABLE = "LADDERSTITCH_HOME"
"""Environment variable that names the folder of fetched bundles."""
EMBEDDED_FOLDER = Path(__file__).parent
EMBEDDED = EMBEDDED_FOLDER / "fashion-mnist"
"""The bundle that `serve` uses unless another one is named."""
MANIFESTS = ("model.yaml", "config.json")
"""The file that makes a folder a bundle; the second is that of transformers."""
LANGUAGE_FAMILY: Final = "llama"
"""The value of `family` in the `model.yaml` of a language model."""


def models_home() -> Path:
    """Return the folder of fetched bundles: LADDERSTITCH_HOME, or one in the user's data folder."""
    if home := os.environ.get(HOME_VARIABLE):
        return Path(home)
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    if not Path(data).is_absolute():  # a user id without an entry in passwd, and no HOME
        data = "/var/lib"
    return Path(data) / "ladderstitch"


MAX_PROBLEM_BYTES = 200
"""Length of one problem in an error message."""


def find_bundle(name: str, *, paths: bool = True) -> Path:
    """Return the path of the bundle that has this name or, with `paths`, this path.

    Without `paths`, callers of a server cannot reach other folders of its machine. Raises
    `BundleError`, which lists the known names, if there is no such bundle.
    """
    if not paths and (name in ("", "..") or Path(name).name != name or len(name) > 200):
        raise BundleError(f"model: expected the name of a bundle, got {name[:200]!r}")
    folders = (models_home(), EMBEDDED_FOLDER)
    for path in (*([Path(name)] if paths else []), *(folder / name for folder in folders)):
        if any((path / file).is_file() for file in MANIFESTS):
            return path
    known = sorted({p.parent.name for f in folders for m in MANIFESTS for p in f.glob(f"*/{m}")})
    raise BundleError(
        f"model: expected a bundle, got {name!r}; known bundles: {', '.join(known) or 'none'}; "
        "`ladderstitch fetch --help` lists more"
    )


def has_bundle(name: str) -> bool:
    """Return whether a bundle of this name was fetched, or comes with this package.

    The name must not be a path.
    """
    folders = (models_home(), EMBEDDED_FOLDER)
    return any((folder / name / file).is_file() for folder in folders for file in MANIFESTS)


def is_language_bundle(path: Path) -> bool:
    """Return whether a bundle holds a language model; reads only its `model.yaml`.

    A folder of transformers, which has a `config.json` instead, is taken for one. Raises
    `BundleError` if the file cannot be read.
    """
    if not (path / MANIFESTS[0]).exists() and (path / MANIFESTS[1]).exists():
        return True
    raw = read_yaml(path / "model.yaml")
    return isinstance(raw, dict) and raw.get("family") == LANGUAGE_FAMILY


MAX_LISTED = 20
"""Maximum number of problems that one error message lists."""

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of tensors by name."""


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Return the shape of each tensor by its name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_tensors(expected: Shapes, got: Shapes, *, where: str) -> None:
    """Raise `BundleError` if tensors are missing, unknown or of another shape.

    The message counts and names them; `where` names the file or the model that was checked.
    """
    problems = [f"missing {name}" for name in expected.keys() - got.keys()]
    problems += [f"unknown {name}" for name in got.keys() - expected.keys()]
    problems += [
        f"{name}: expected {expected[name]}, got {got[name]}"
        for name in expected.keys() & got.keys()
        if expected[name] != got[name]
    ]
    raise_for(problems, where=where)


def raise_for(problems: Collection[str], *, where: str) -> None:
    """Raise `BundleError` with the number of problems and the first ones if there are any."""
    if problems:
        shown = sorted(problems)[:MAX_LISTED]
        listed = "; ".join(shorten(problem, MAX_PROBLEM_BYTES) for problem in shown)
        raise BundleError(f"{where}: {len(problems)} wrong tensors: {listed}")

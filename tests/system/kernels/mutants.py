"""A copy of the package with changed source: planted bugs are in what runs."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """Each (old, new): old occurs in the module's source, and is replaced wherever it does."""

    module: str
    """Its path within the package."""
    edits: tuple[tuple[str, str], ...]


def change(mutant: Mutant, folder: Path) -> None:
    """Put the changed package into the folder, for a search path."""
    package = importlib.util.find_spec("ladderstitch_kernels")
    assert package is not None
    (original,) = package.submodule_search_locations or ()
    copy = shutil.copytree(original, folder / "ladderstitch_kernels")
    changed = copy / f"{mutant.module}.py"
    source = changed.read_text()
    for old, new in mutant.edits:
        assert old in source, f"{mutant.module} holds no {old!r}"
        source = source.replace(old, new)
    changed.write_text(source)

"""Copies of the kernel package with a planted bug in the source."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """A planted bug: each edit (old, new) replaces all occurrences of old in a module's source."""

    module: str
    """The module's path within the package, without suffix."""
    edits: tuple[tuple[str, str], ...]


def write_mutant(mutant: Mutant, folder: Path) -> None:
    """Copy the package with the planted bug into a folder, which can then be a search path."""
    package = importlib.util.find_spec("ladderstitch_kernels")
    assert package is not None
    (original,) = package.submodule_search_locations or ()
    copy = shutil.copytree(original, folder / "ladderstitch_kernels")
    module = copy / f"{mutant.module}.py"
    source = module.read_text()
    for old, new in mutant.edits:
        assert old in source, f"{mutant.module}: expected {old!r} in the source"
        source = source.replace(old, new)
    module.write_text(source)

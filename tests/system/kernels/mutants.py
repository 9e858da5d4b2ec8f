"""Copies of the kernel package with a planted bug in the source."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "ladderstitch_kernels"


@dataclass(frozen=True)
class Mutant:
    """A planted bug: each edit (old, new) replaces all occurrences of old in a module's source."""

    module: str
    """The module's path within the package, without suffix."""
    edits: tuple[tuple[str, str], ...]


def write_mutant(mutant: Mutant, folder: Path) -> None:
    """Copy the package with the planted bug into a folder, which can then be a search path."""
    package = importlib.util.find_spec(PACKAGE)
    assert package is not None
    (original,) = package.submodule_search_locations or ()
    copy = shutil.copytree(original, folder / PACKAGE)
    module = copy / f"{mutant.module}.py"
    source = module.read_text()
    for old, new in mutant.edits:
        assert old in source, f"{mutant.module}: expected {old!r} in the source"
        source = source.replace(old, new)
    module.write_text(source)


@contextmanager
def imported_mutant(mutant: Mutant, folder: Path) -> Iterator[None]:
    """Make imports of the package yield a mutant, which is written into a new folder.

    Several mutants can so be run in a process, one after the other. Modules that had imported the
    package before keep what they had.
    """
    folder.mkdir()
    _forget_package()
    write_mutant(mutant, folder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        _forget_package()


def _forget_package() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    importlib.invalidate_caches()

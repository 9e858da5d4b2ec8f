"""Which folders the name of a bundle reaches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ladderstitch.bundles import EMBEDDED_FOLDER, find_bundle
from ladderstitch.errors import BundleError
from tests.conftest import make_tiny_bundle

NAME = "fashion-mnist"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working directory, which holds a bundle, with an empty folder of bundles."""
    make_tiny_bundle(tmp_path / "here" / "mine")
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("LADDERSTITCH_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize(
    "name",
    [
        "mine",
        "./mine",
        "../here/mine",
        "{folder}/mine",
        f"../{EMBEDDED_FOLDER.name}/{NAME}",
        f"./{NAME}",
        f"{NAME}/",
        f"{NAME}/.",
        "",
        ".",
        "..",
        "a\0b",
        "x" * 5000,
    ],
)
def test_name_reaches_no_other_folder(folder: Path, name: str) -> None:
    relative = os.path.relpath(folder / "mine", EMBEDDED_FOLDER)
    for given in (name.format(folder=folder), relative):
        with pytest.raises(BundleError, match="model: expected"):
            find_bundle(given, paths=False)


def test_path_is_found_if_the_command_line_gives_it(folder: Path) -> None:
    assert find_bundle("mine") == Path("mine")
    assert find_bundle(str(folder / "mine")) == folder / "mine"
    assert find_bundle(NAME, paths=False) == EMBEDDED_FOLDER / NAME

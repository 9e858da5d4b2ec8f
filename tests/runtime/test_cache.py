"""Tests of the cache: where it is, and folders that appear complete or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from ladderstitch.runtime.cache import cache_home, cached_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a cache of this test."""
    monkeypatch.setenv("LADDERSTITCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cached_folder_is_filled_once(cache: Path) -> None:
    fills: list[Path] = []

    def fill(folder: Path) -> None:
        fills.append(folder)
        (folder / "file").write_text("content")

    for _ in range(2):
        folder = cached_folder("kind", "key", fill)
        assert folder == cache / "kind" / "key"
        assert (folder / "file").read_text() == "content"
    assert len(fills) == 1


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_cached_folder_failed_fill_leaves_nothing(cache: Path, error: type[Exception]) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise error("no space")

    with pytest.raises(error, match="no space"):
        cached_folder("kind", "key", fail)
    assert list((cache / "kind").iterdir()) == []


def test_cached_folder_keeps_that_of_a_faster_process(cache: Path) -> None:
    def fill_faster(folder: Path) -> None:
        (folder / "file").write_text("faster")

    def fill(folder: Path) -> None:
        (folder / "file").write_text("slower")
        cached_folder("kind", "key", fill_faster)

    folder = cached_folder("kind", "key", fill)
    assert (folder / "file").read_text() == "faster"
    assert [path.name for path in (cache / "kind").iterdir()] == ["key"]


def test_cache_home_without_a_writable_home_is_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LADDERSTITCH_CACHE")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    home = cache_home()
    assert home == cache_home() == tmp_path / f"ladderstitch-{os.getuid()}"
    home.chmod(0o777)  # another user may have written to it
    assert cache_home() not in (home, cache_home())


def test_user_without_a_home_has_a_temporary_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("LADDERSTITCH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no HOME, no entry in passwd
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cache_home().parent == tmp_path

"""`make`: what is wrong is said before any work, and a failure leaves nothing behind."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ladderstitch.cli import app
from ladderstitch.importers import make_family as make_family_module
from ladderstitch.vision.bundle import VisionBundle
from tests.support.onnx_networks import write_network, write_photographs

runner = CliRunner()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a network, photographs, and a folder that is no bundle; go there."""
    monkeypatch.chdir(tmp_path)
    write_network(tmp_path, "convnext", 4).rename(tmp_path / "net.onnx")
    write_photographs(tmp_path / "photos", 4)
    return tmp_path


def make(*options: str, status: int = 0) -> str:
    """Run `make` on the network, and return its output as one line."""
    command = ["make", "net.onnx", "--images", "photos", "--rounds", "2", *options]
    result = runner.invoke(app, command)
    assert result.exit_code == status, result.output
    return " ".join(result.output.split())


def digests(folder: Path) -> dict[str, str]:
    """Return the hashes of all files of a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def break_photographs(work: Path) -> None:
    """Cut the files off, which is found when they are read."""
    for path in (work / "photos").iterdir():
        path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--name", "Not A Name", "--into", "b"), "name: expected up to 63"),
        (("--name", "../b", "--into", "b"), "name: expected up to 63"),
        (("--name", "b", "--into", "photos"), "into: expected a new folder or a bundle"),
        (("--name", "b", "--into", "net.onnx"), "into: expected a folder, got the file"),
        (("--name", "b", "--into", "net.onnx/b"), "into: expected a folder that can be"),
        (("--name", "b", "--into", "b", "--plot", "b.jpg"), "plot: expected a file name"),
        (("--name", "b", "--into", "b", "--crop", "1.5"), "crop: expected a share"),
        (("--name", "b", "--into", "b", "--std", "0,1,1"), "std: expected positive"),
        (("--name", "b", "--into", "b", "--labelled", "gone"), "labelled: expected a file"),
        (("--name", "b", "--into", "b", "--resize", "area"), "resize: expected bilinear"),
    ],
)
def test_options_are_checked_before_any_network_is_read(
    options: tuple[str, ...], message: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_family_module, "load_family", None)  # calling it would fail
    before = digests(work)
    assert message in make(*options, status=2)
    assert digests(work) == before


def test_failure_in_the_middle_leaves_nothing_that_blocks_the_next_run(work: Path) -> None:
    break_photographs(work)
    before = digests(work)
    assert ".png" in make("--name", "b", "--into", "made/b", status=2)
    assert digests(work) == before
    assert not any((work / "made").iterdir())
    write_photographs(work / "photos", 4)
    said = make("--name", "b", "--into", "made/b")
    assert "1 networks; 3 images to fit on, 1 others to measure on" in said
    made = VisionBundle.load(work / "made" / "b")
    assert made.latency is not None
    assert [path.name for path in (work / "made").iterdir()] == ["b"]


def test_bundle_is_replaced_as_a_whole_and_only_if_asked(work: Path) -> None:
    make("--name", "b", "--into", "b")
    (work / "b" / "stale.txt").write_text("from before")
    before = digests(work / "b")
    assert "--replace writes over it" in make("--name", "b", "--into", "b", status=2)
    break_photographs(work)
    make("--name", "b", "--into", "b", "--replace", status=2)
    assert digests(work / "b") == before
    write_photographs(work / "photos", 4)
    make("--name", "c", "--into", "b", "--replace")
    assert VisionBundle.load(work / "b").manifest.name == "c"
    assert not (work / "b" / "stale.txt").exists()

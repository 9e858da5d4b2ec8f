"""Tests of the commands that make an image bundle, on a toy data set."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from ladderstitch.cli import app
from ladderstitch.errors import ConfigError, DataError
from ladderstitch.training.vision import loop
from ladderstitch.training.vision.dataset import augment, load_idx_folder
from ladderstitch.training.vision.recipe import Recipe
from ladderstitch.vision.bundle import VisionBundle

runner = CliRunner()

RECIPE = {
    "name": "toy",
    "seed": 7,
    "threads": 1,
    "data": {
        "name": "toy",
        "licence": "none",
        "labels": ["left", "right"],
        "mean": [0.4],
        "std": [0.3],
        "validation_images": 32,
        "augmentation": {"shift_pixels": 1, "erase_pixels": 3},
    },
    "family": {
        "inputs": {"image_size": 8, "in_channels": 1, "num_classes": 2},
        "anchors": [
            {
                "embed_dim": width,
                "depth": 2,
                "num_heads": 2,
                "stem": [[4, 2], [width, 2]],
                "stem_batch_norm": True,
            }
            for width in (8, 12)
        ],
        "final_norm_on_stitches": True,
    },
    "anchors": [{"epochs": 2, "batch_size": 32, "learning_rate": 0.01}] * 2,
    "stitching": {"epochs": 2, "batch_size": 32, "learning_rate": 0.005},
    "init_images": 32,
}


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write an array as a gzipped IDX file."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def work_folder(tmp_path: Path) -> Path:
    """Return a folder with a recipe, and images whose top or bottom half is bright.

    Horizontal flips do not change the label.
    """
    rng = np.random.default_rng(0)
    for split, n in (("train", 288), ("t10k", 64)):
        labels = rng.integers(0, 2, n)
        images = rng.integers(0, 90, (n, 8, 8))
        images[labels == 0, :4] += 120
        images[labels == 1, 4:] += 120
        write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", labels)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


def ladderstitch(*arguments: object) -> str:
    """Run a command that must succeed; return its output."""
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def make(work_folder: Path, run: str) -> Path:
    """Train and stitch the recipe; return the bundle."""
    recipe, folder, bundle = (
        work_folder / "recipe.yaml",
        work_folder / run,
        work_folder / f"{run}-bundle",
    )
    ladderstitch("train", recipe, "--data", work_folder, "--run", folder)
    ladderstitch("stitch", recipe, "--data", work_folder, "--run", folder, "--bundle", bundle)
    return bundle


def test_commands_make_measured_family(work_folder: Path) -> None:
    bundle = make(work_folder, "run")
    ladderstitch("calibrate", bundle, "--data", work_folder, "--name", "toy test")
    ladderstitch("profile", bundle, "--rounds", 2)
    picture = work_folder / "frontier.png"
    title = " ".join(ladderstitch("frontier", bundle).split())
    assert "quality and latency, trained in" in title
    assert "frontier of quality" in ladderstitch("frontier", bundle, "--plot", picture, "--all")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "quality and macs" in ladderstitch("frontier", bundle, "--macs", "--plot", picture)

    loaded = VisionBundle.load(bundle)
    assert loaded.quality is not None
    assert loaded.latency is not None
    ids = {stitch.id for stitch in loaded.manifest.config.stitches()}
    assert loaded.quality.variants.keys() == loaded.latency.variants.keys() == ids
    for quality in loaded.quality.variants.values():
        assert quality.low < quality.value <= quality.high
        assert quality.value > 0.9  # the task is easy: half of the images are bright on top

    ladderstitch("quantize", bundle, "--data", work_folder)
    ladderstitch("calibrate", bundle, "--data", work_folder, "--name", "toy test")
    ladderstitch("profile", bundle, "--rounds", 2)
    assert "-int8" in ladderstitch("frontier", bundle, "--plot", picture, "--all")
    quantised = VisionBundle.load(bundle)
    assert quantised.quality is not None
    assert quantised.quality.variants.keys() == {v.id for v in quantised.manifest.variants()}
    assert min(quality.value for quality in quantised.quality.variants.values()) > 0.9


def test_training_time_needs_every_epoch(tmp_path: Path) -> None:
    assert loop.read_cpu_seconds(tmp_path) is None
    log = tmp_path / "anchor-0.log.jsonl"
    log.write_text('{"epoch": 1, "cpu_seconds": 1.5}\n{"epoch": 2, "cpu_seconds": 2.0}\n')
    (tmp_path / "family.log.jsonl").write_text('{"epoch": 1, "cpu_seconds": 3.0}\n')
    assert loop.read_cpu_seconds(tmp_path) == 6.5
    log.write_text('{"epoch": 1, "seconds": 1.5}\n')  # before times were recorded
    assert loop.read_cpu_seconds(tmp_path) is None


def test_train_and_stitch_same_seed_same_weights(work_folder: Path) -> None:
    first, second = make(work_folder, "one"), make(work_folder, "two")
    assert (first / "weights.safetensors").read_bytes() == (
        second / "weights.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("stage", ["train", "stitch"])
def test_interrupted_run_resumes_to_same_weights(
    work_folder: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_file(make(work_folder, "whole") / "weights.safetensors")
    save, name = loop._save_checkpoint, {"train": "anchor-1", "stitch": "family"}[stage]

    def save_then_stop(run: loop.TrainingRun, epochs_done: int, *state: object) -> None:
        save(run, epochs_done, *state)  # type: ignore[arg-type] # passed through
        if run.name == name and epochs_done == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop, "_save_checkpoint", save_then_stop)
        with pytest.raises(AssertionError):
            make(work_folder, "broken")
    got = load_file(make(work_folder, "broken") / "weights.safetensors")
    assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())


def test_calibrate_resumes_after_measured_stitches(work_folder: Path) -> None:
    bundle = make(work_folder, "run")
    ladderstitch("calibrate", bundle, "--data", work_folder, "--name", "toy test")
    path = bundle / "quality.json"
    whole = json.loads(path.read_text())
    marked = whole | {"variants": dict(list(whole["variants"].items())[:2])}
    marked["variants"]["0"] = {"value": 0.123, "low": 0.1, "high": 0.2}
    path.write_text(json.dumps(marked))
    ladderstitch("calibrate", bundle, "--data", work_folder, "--name", "toy test")
    resumed = json.loads(path.read_text())["variants"]
    assert resumed["0"]["value"] == 0.123
    assert {k: v for k, v in resumed.items() if k != "0"} == {
        k: v for k, v in whole["variants"].items() if k != "0"
    }


def test_augment_same_seed_same_images() -> None:
    images = torch.randn(16, 1, 8, 8)
    first, second = (
        augment(images, torch.Generator().manual_seed(3), shift=2, erase=3) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert first.shape == images.shape
    unchanged = augment(images, torch.Generator().manual_seed(3), shift=0, erase=0)
    kept = (unchanged == images).flatten(1).all(1)
    flipped = (unchanged == images.flip(3)).flatten(1).all(1)
    assert (kept | flipped).all()
    assert 0 < int(flipped.sum()) < 16


def test_recipe_wrong_field_is_named(work_folder: Path) -> None:
    path = work_folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"stitching": {"epochs": 0, "learning_rate": 1}}))
    with pytest.raises(ConfigError, match=r"stitching\.epochs"):
        Recipe.load(path)
    result = runner.invoke(
        app, ["train", str(path), "--data", str(work_folder), "--run", str(work_folder / "run")]
    )
    assert result.exit_code == 2
    assert "stitching.epochs" in result.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "gzipped IDX"),
        (gzip.compress(b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00"), "header of unsigned bytes"),
        (
            gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x09\x00"),
            r"expected \(9,\) from the header",
        ),
    ],
    ids=["not-gzip", "floats", "short"],
)
def test_load_idx_folder_broken_file_raises(
    work_folder: Path, content: bytes, message: str
) -> None:
    (work_folder / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_idx_folder(work_folder, "train", (1, 8, 8), 2)

"""From raw images to a measured bundle by the commands of the README, on a toy data set."""

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
from ladderstitch.vision.bundle import Bundle

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
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A recipe and images whose top or bottom half is bright: flips cannot confuse the two."""
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
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def make(workplace: Path, run: str) -> Path:
    recipe, folder, bundle = workplace / "recipe.yaml", workplace / run, workplace / f"{run}-bundle"
    ladderstitch("train", recipe, "--data", workplace, "--run", folder)
    ladderstitch("stitch", recipe, "--data", workplace, "--run", folder, "--bundle", bundle)
    return bundle


def test_the_commands_make_a_measured_family(workplace: Path) -> None:
    bundle = make(workplace, "run")
    ladderstitch("calibrate", bundle, "--data", workplace, "--name", "toy test")
    ladderstitch("profile", bundle, "--rounds", 2)
    picture = workplace / "frontier.png"
    assert "frontier of quality" in ladderstitch("frontier", bundle, "--plot", picture, "--all")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "quality and macs" in ladderstitch("frontier", bundle, "--macs", "--plot", picture)

    loaded = Bundle.load(bundle)
    assert loaded.quality is not None
    assert loaded.latency is not None
    ids = {stitch.id for stitch in loaded.manifest.config.stitches()}
    assert loaded.quality.variants.keys() == loaded.latency.variants.keys() == ids
    for quality in loaded.quality.variants.values():
        assert quality.low < quality.value <= quality.high
        assert quality.value > 0.9  # half of the images are bright on top: easy to learn


def test_the_same_seed_makes_the_same_weights(workplace: Path) -> None:
    first, second = make(workplace, "one"), make(workplace, "two")
    assert (first / "weights.safetensors").read_bytes() == (
        second / "weights.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("stage", ["train", "stitch"])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    workplace: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = load_file(make(workplace, "whole") / "weights.safetensors")
    save, name = loop._save, {"train": "anchor-1", "stitch": "family"}[stage]

    def save_then_stop(run: loop.TrainingRun, epochs_done: int, *state: object) -> None:
        save(run, epochs_done, *state)  # type: ignore[arg-type] # passed through
        if run.name == name and epochs_done == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop, "_save", save_then_stop)
        with pytest.raises(AssertionError):
            make(workplace, "broken")
    got = load_file(make(workplace, "broken") / "weights.safetensors")
    assert all(torch.equal(got[key], tensor) for key, tensor in wanted.items())


def test_calibration_resumes(workplace: Path) -> None:
    bundle = make(workplace, "run")
    ladderstitch("calibrate", bundle, "--data", workplace, "--name", "toy test")
    path = bundle / "quality.json"
    whole = json.loads(path.read_text())
    marked = whole | {"variants": dict(list(whole["variants"].items())[:2])}
    marked["variants"]["0"] = {"value": 0.123, "low": 0.1, "high": 0.2}
    path.write_text(json.dumps(marked))
    ladderstitch("calibrate", bundle, "--data", workplace, "--name", "toy test")
    resumed = json.loads(path.read_text())["variants"]
    assert resumed["0"]["value"] == 0.123
    assert {k: v for k, v in resumed.items() if k != "0"} == {
        k: v for k, v in whole["variants"].items() if k != "0"
    }


def test_augmentation_is_seeded_and_keeps_shape() -> None:
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


def test_a_recipe_names_the_wrong_field(workplace: Path) -> None:
    path = workplace / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"stitching": {"epochs": 0, "learning_rate": 1}}))
    with pytest.raises(ConfigError, match=r"stitching\.epochs"):
        Recipe.load(path)
    result = runner.invoke(
        app, ["train", str(path), "--data", str(workplace), "--run", str(workplace / "run")]
    )
    assert result.exit_code == 2
    assert "stitching.epochs" in result.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "gzipped IDX"),
        (gzip.compress(b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00"), "header of unsigned bytes"),
        (gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x09\x00"), r"header says \(9,\)"),
    ],
    ids=["not-gzip", "floats", "short"],
)
def test_broken_data_files_are_refused(workplace: Path, content: bytes, message: str) -> None:
    (workplace / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_idx_folder(workplace, "train")

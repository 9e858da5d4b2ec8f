"""Tests of `train --nested`, recalibration by `calibrate`, and pruning by `frontier`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from ladderstitch.cli import app
from ladderstitch.training.vision.recipe import NestedRecipe
from ladderstitch.vision.bundle import VisionBundle
from tests.support.nested_nets import NETS, write_nested

runner = CliRunner()
INPUTS = {"image_size": 16, "in_channels": 1, "num_classes": 2}


def write_pictures(folder: Path) -> Path:
    """Write 24 pictures of two classes: bright ones above, or below."""
    rng = np.random.default_rng(0)
    for number in range(24):
        pixels = rng.integers(0, 60, (16, 16))
        half = slice(0, 8) if number % 2 else slice(8, 16)
        pixels[half] += 150
        path = folder / ("above" if number % 2 else "below") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def write_recipe(folder: Path, **training: object) -> Path:
    """Write the recipe of a small supernet."""
    schedule = {"epochs": 8, "batch_size": 8, "learning_rate": 0.01, "label_smoothing": 0.0}
    fields = {
        "name": "small",
        "threads": 1,
        "precision": "float32",
        "data": {"name": "halves", "licence": "none", "augmentation": {"shift_pixels": 0}},
        "family": {
            "family": "nested",
            "inputs": INPUTS,
            "net": {"kind": "ofa-resnet", "stem_pool": False, **NETS["ofa-resnet"]},
        },
        "paths": 4,
        "training": schedule | training,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def invoke(*arguments: object) -> str:
    """Run a command that must succeed; return what it printed."""
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_trained_supernet_is_measured_profiled_and_pruned(tmp_path: Path) -> None:
    data, recipe = write_pictures(tmp_path / "data"), write_recipe(tmp_path)
    into, plot = tmp_path / "net", tmp_path / "plot.png"
    invoke("train", recipe, "--nested", "--data", data, "--into", into, "--split", 0.25)
    bundle = VisionBundle.load(into)
    assert bundle.quality is not None
    assert bundle.quality.n == 6
    assert len(bundle.quality.variants) == 4
    log = (tmp_path / "net.run" / "supernet.log.jsonl").read_text().splitlines()
    spent = sum(json.loads(line)["cpu_seconds"] for line in log)
    assert bundle.manifest.training_cpu_s == pytest.approx(spent)
    assert spent > 0
    # the statistics of a path make the difference between learning and chance
    assert max(quality.value for quality in bundle.quality.variants.values()) >= 0.9
    invoke("profile", into, "--rounds", 2, "--threads", 1)
    invoke("frontier", into, "--plot", plot, "--compare", into, "--prune", tmp_path / "best")
    assert plot.stat().st_size > 1000
    pruned = VisionBundle.load(tmp_path / "best")
    names = {stitch.name: stitch.id for stitch in pruned.manifest.variants()}
    before = {stitch.name: stitch.id for stitch in bundle.manifest.variants()}
    statistics = load_file(bundle.statistics_path), load_file(pruned.statistics_path)
    name = "input_stem.0.bn.bn.running_mean"
    assert pruned.quality is not None
    for path, new in names.items():
        assert pruned.quality.variants[new] == bundle.quality.variants[before[path]]
        kept = statistics[1][f"{new}.{name}"]
        assert kept.equal(statistics[0][f"{before[path]}.{name}"])


def test_train_nested_same_seed_same_bytes(tmp_path: Path) -> None:
    data, recipe = write_pictures(tmp_path / "data"), write_recipe(tmp_path, epochs=1)
    for name in ("one", "two"):
        invoke("train", recipe, "--nested", "--data", data, "--into", tmp_path / name)
    for file in ("weights.safetensors", "statistics.safetensors"):
        first, second = ((tmp_path / name / file).read_bytes() for name in ("one", "two"))
        assert first == second


def test_calibrate_recalibrates_once(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data")
    write_nested(tmp_path / "net", "ofa-resnet", 3)
    bundle = VisionBundle.load(tmp_path / "net")
    invoke("calibrate", bundle.path, "--images", data / "above")
    first = bundle.statistics_path.read_bytes()
    agreement = json.loads((bundle.path / "quality.json").read_text())["variants"]
    assert agreement["2"]["value"] == 1.0  # the largest is the reference
    invoke("calibrate", bundle.path, "--images", data / "below")
    assert bundle.statistics_path.read_bytes() == first


def test_supernet_cannot_be_quantised(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data")
    write_nested(tmp_path / "net", "ofa-resnet", 3)
    result = runner.invoke(app, ["quantize", str(tmp_path / "net"), "--data", str(data / "above")])
    assert result.exit_code == 2
    assert "expected a family of anchors, got the supernet" in result.output.replace("\n", " ")


def test_nested_needs_recipe_and_bundle(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data")
    result = runner.invoke(app, ["train", "--nested", "--data", str(data)])
    assert result.exit_code == 2
    assert "nested: expected a recipe and --into" in result.output


def test_recipe_samples_the_same_paths_each_time(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    first, second = NestedRecipe.load(path), NestedRecipe.load(path)
    assert first.family == second.family
    assert len(first.family.net.paths) == 4
    renamed = first.renamed("other", 7)
    assert renamed.family == first.family


@pytest.mark.parametrize("field", ["epochs", "random_paths"])
def test_recipe_names_a_wrong_field(tmp_path: Path, field: str) -> None:
    path = write_recipe(tmp_path, **{field: -1})
    result = runner.invoke(
        app,
        ["train", str(path), "--nested", "--data", str(tmp_path), "--into", str(tmp_path / "x")],
    )
    assert result.exit_code == 2
    assert f"training.{field}" in result.output.replace("\n", "")

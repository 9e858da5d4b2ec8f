"""`--json` of the commands that make or measure a bundle: one document, notes to standard error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ladderstitch.cli import app
from ladderstitch.cli.app import COMMANDS, load_command
from ladderstitch.importers import fetch
from ladderstitch.vision.bundle import VisionBundle
from tests.conftest import make_tiny_bundle
from tests.importers.test_import_olmo import write_checkpoint
from tests.support.coloured_pictures import RECIPE, write_pictures
from tests.support.language_models import write_tiny
from tests.support.onnx_networks import write_network
from tests.training.text.test_compare_schemes import train as train_language

RUN_UNTIL_STOPPED = {"serve", "rank", "gateway"}


def document(*arguments: object) -> Any:
    """Return the document on the standard output of a command that must succeed."""
    done = CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--json")])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - RUN_UNTIL_STOPPED))
def test_every_command_that_ends_has_json(name: str) -> None:
    options = {option for parameter in load_command(name).params for option in parameter.opts}
    assert "--json" in options


def test_steps_of_training_print_their_bundles(tmp_path: Path) -> None:
    photos, run, bundle = write_pictures(tmp_path / "photos", 8), tmp_path / "run", tmp_path / "b"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    trained = document("train", recipe, "--data", photos, "--run", run, "--split", 0.25)
    assert trained == {
        "bundle": None,
        "run": str(run),
        "images": 18,
        "held_out": 6,
        "labels": ["blue", "green", "red"],
        "variants": [],
    }
    stitched = document("stitch", recipe, "--data", photos, "--run", run, "--bundle", bundle)
    usable = {v.id: v.name for v in VisionBundle.load(bundle).manifest.variants() if v.usable}
    assert stitched["bundle"] == str(bundle)
    assert {v["variant"]: v["name"] for v in stitched["variants"]} == usable
    assert all(v["quality"] is None for v in stitched["variants"])
    measured = document("calibrate", bundle, "--data", run / "held-out.csv")["variants"]
    assert [v["variant"] for v in measured] == list(usable)
    assert all(v["low"] <= v["quality"] <= v["high"] for v in measured)
    profiled = document("profile", bundle, "--rounds", 2)
    assert (profiled["threads"], profiled["bundle"]) == (1, str(bundle))
    rows = profiled["variants"]
    assert {row["variant"] for row in rows} == set(usable)
    assert {row["batch_size"] for row in rows} >= {1, 2}
    assert all(0 < row["median_s"] <= row["p99_s"] for row in rows)


def test_train_into_a_bundle_prints_its_qualities(tmp_path: Path) -> None:
    photos, bundle = write_pictures(tmp_path / "photos", 8), tmp_path / "b"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    options = ("--data", photos, "--into", bundle, "--split", 0.25)
    trained = document("train", tmp_path / "recipe.yaml", *options)
    assert (trained["bundle"], trained["run"]) == (str(bundle), f"{bundle}.run")
    assert all(v["quality_metric"] == "top-1 accuracy" for v in trained["variants"])
    assert all(0 <= v["quality"] <= 1 for v in trained["variants"])


def test_profile_of_a_language_model_prints_its_paths(tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "tiny")
    profiled = document("profile", bundle, "--rounds", 2)
    assert {row["name"] for row in profiled["variants"]} == {"standard"}
    assert all(row["median_s"] > 0 for row in profiled["variants"])


def test_imports_print_their_bundles(tmp_path: Path) -> None:
    network = write_network(tmp_path, "resnet", 1)
    imported = document("import", network, "--into", tmp_path / "one")
    assert [v["name"] for v in imported["variants"]] == [network.stem]
    folder = write_checkpoint(tmp_path / "olmo")
    options = ("--into", tmp_path / "two", "--family", "matformer-olmo")
    imported = document("import", folder, *options)
    assert [v["name"] for v in imported["variants"]][:2] == ["ffn-256", "ffn-128"]
    assert imported["variants"][0]["quality"] is None


def test_quantize_prints_the_new_variants(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "tiny").path
    before = {v.id for v in VisionBundle.load(bundle).manifest.variants()}
    pictures = write_pictures(tmp_path / "photos", 2)
    quantized = document("quantize", bundle, "--data", pictures, "--images", 4)
    assert {v["variant"] for v in quantized["variants"]} > before
    assert Path(quantized["written"]).is_dir()


def test_schemes_of_small_models_are_printed_in_all_forms(tmp_path: Path) -> None:
    run = train_language(tmp_path, "run")
    command = ["train-language", "--recipe", tmp_path / "recipe.yaml", "--run", run]
    command += ["--text", tmp_path / "train.txt", "--held-out", tmp_path / "held.txt"]
    found = document(*command)
    assert found["parameters"] > 0
    assert all(math.isfinite(loss) for loss in found["held_out_loss"].values())
    done = CliRunner().invoke(app, [str(argument) for argument in command])
    head, *rows = done.stdout.splitlines()
    assert head == "name\theld_out_loss"
    assert [row.split("\t")[0] for row in rows] == list(found["held_out_loss"])


def test_fetch_says_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []  # instead of a download
    monkeypatch.setattr(fetch, "fetch_data", lambda what, folder: written.append((what, folder)))
    found = document("fetch", "brown", "--into", tmp_path / "brown")
    assert written == [("brown", tmp_path / "brown")]
    folder = str(tmp_path / "brown")
    assert found == {"name": "brown", "kind": "data", "folder": folder, "photographs": []}

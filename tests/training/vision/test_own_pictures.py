"""Training on pictures of one's own: classes, sizes, colours, splits, and refusals by name."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from ladderstitch.cli import app, console
from ladderstitch.errors import ConfigError, DataError
from ladderstitch.training.vision.recipe import OWN_PICTURES, Recipe
from ladderstitch.training.vision.training_data import load_training_data, measure_channels
from ladderstitch.vision.bundle import VisionBundle
from tests.support.coloured_pictures import COLOURS, RECIPE, write_pictures
from tests.training.vision.test_pipeline import write_idx

runner = CliRunner()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def ladderstitch(*arguments: object, fails: bool = False) -> str:
    """Run a command, and return its output as one line."""
    with mock.patch.object(console.err, "_width", 1000):  # keeps long paths whole
        result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == (2 if fails else 0), result.output
    return " ".join(result.output.split())


def test_one_command_makes_a_bundle_with_the_labels_of_the_folders(
    tmp_path: Path, recipe: Path
) -> None:
    photos, bundle = write_pictures(tmp_path / "photos", 12), tmp_path / "Mine"
    options = ("--into", bundle, "--name", "mine", "--split", 0.25)
    said = ladderstitch("train", recipe, "--data", photos, *options)
    assert "27 images to train on, 9 held out; 3 labels: blue, green, red" in said
    loaded = VisionBundle.load(bundle)
    assert loaded.manifest.name == "mine"
    assert loaded.manifest.labels == ("blue", "green", "red")
    assert loaded.manifest.preprocessing.height == 16
    assert loaded.quality is not None
    assert loaded.quality.n == 9
    assert max(quality.value for quality in loaded.quality.variants.values()) > 0.8
    pixels = [np.asarray(Image.open(p).convert("RGB")) for p in sorted(photos.rglob("*.png"))]
    mean = np.mean([image.mean((0, 1)) / 255 for image in pixels], 0)
    np.testing.assert_allclose(loaded.manifest.preprocessing.mean, mean, atol=0.05)


def test_steps_one_by_one_and_stitching_without_labels(tmp_path: Path, recipe: Path) -> None:
    photos, run = write_pictures(tmp_path / "photos", 12), tmp_path / "run"
    ladderstitch(
        "train", recipe, "--data", photos, "--run", run, "--image-size", 24, "--split", 0.5
    )
    bundle, unlabelled = tmp_path / "labelled", tmp_path / "unlabelled"
    said = ladderstitch("stitch", recipe, "--data", photos, "--run", run, "--bundle", bundle)
    assert "held-out.csv" in said
    ladderstitch("calibrate", bundle, "--data", run / "held-out.csv")
    quality = VisionBundle.load(bundle).quality
    assert quality is not None
    assert quality.n == 18
    assert max(entry.value for entry in quality.variants.values()) > 0.8

    ladderstitch("stitch", recipe, "--images", photos, "--run", run, "--bundle", unlabelled)
    made = VisionBundle.load(unlabelled)
    assert made.manifest.preprocessing.height == 24
    assert made.manifest.labels == ("blue", "green", "red")
    trained = load_file(run / "anchor-1.safetensors")
    got = load_file(made.weights_path)
    for name, tensor in trained.items():  # anchors are as they were trained, rounded to float16
        torch.testing.assert_close(
            got[f"anchors.1.{name}"].float(), tensor.float(), atol=1e-3, rtol=1e-3
        )
    ladderstitch("calibrate", unlabelled, "--data", run / "held-out.csv")
    ladderstitch("quantize", unlabelled, "--data", photos, "--images", 8)
    assert any(made.int8_folder.glob("*.onnx"))


@pytest.mark.parametrize("kind", ["folder", "csv", "idx"])
def test_classes_that_follow_each_other_are_all_validated(
    kind: str, tmp_path: Path, recipe: Path
) -> None:
    data, chosen = tmp_path / "data", Recipe.load(recipe)
    if kind == "idx":
        data.mkdir()
        write_idx(data / "train-images-idx3-ubyte.gz", np.zeros((40, 16, 16)))
        write_idx(data / "train-labels-idx1-ubyte.gz", np.repeat([0, 1], 20))
        chosen = chosen.completed(num_classes=2, labels=("a", "b"))
        fields = chosen.model_dump()
        fields["family"]["inputs"]["in_channels"] = 1
        chosen = Recipe.model_validate(fields)
    else:
        write_pictures(data, 10)
    if kind == "csv":
        rows = [f"{path},{path.parent.name}" for path in sorted(data.rglob("*.png"))]
        data = tmp_path / "data.csv"
        data.write_text("\n".join(rows))
    first, again = (load_training_data(chosen, data, split=0.3) for _ in range(2))
    other = load_training_data(chosen.renamed("toy", 1), data, split=0.3)
    counts = torch.bincount(first.validation.labels)
    assert counts.tolist() == ([6, 6] if kind == "idx" else [3, 3, 3])
    assert torch.equal(first.train.pixels, again.train.pixels)
    assert first.record == again.record
    assert kind == "idx" or other.record != first.record


def test_every_class_keeps_an_image_to_train_on(tmp_path: Path, recipe: Path) -> None:
    photos = write_pictures(tmp_path / "photos", 1)
    for number in range(9):
        Image.new("RGB", (20, 20), COLOURS["red"]).save(photos / "red" / f"more{number}.png")
    data = load_training_data(Recipe.load(recipe), photos, split=0.5)
    assert set(data.train.labels.tolist()) == {0, 1, 2}
    assert len(data.validation) == 6


def test_pictures_of_all_kinds_become_the_colours_of_the_recipe(
    tmp_path: Path, recipe: Path
) -> None:
    for number, mode in enumerate(("L", "RGBA", "P", "CMYK", "1", "LA")):
        folder = tmp_path / "photos" / str(number)
        folder.mkdir(parents=True)
        suffix = "jpg" if mode == "CMYK" else "png"
        for copy in range(2):
            Image.new("RGB", (3, 50), (200, 100, 50)).convert(mode).save(
                folder / f"{copy}.{suffix}"
            )
    data = load_training_data(Recipe.load(recipe), tmp_path / "photos", split=0.5)
    assert data.train.pixels.shape == (6, 3, 16, 16)
    by_label = {int(n): p for n, p in zip(data.train.labels, data.train.pixels, strict=True)}
    grey = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    for label, expected in ((0, (grey,) * 3), (1, (200, 100, 50)), (5, (grey,) * 3)):
        got = by_label[label].float().mean((1, 2))
        np.testing.assert_allclose(got, expected, atol=2)


def test_numbers_as_classes_are_in_the_order_of_their_values(tmp_path: Path, recipe: Path) -> None:
    for name in ("10", "9", "2"):
        write_pictures(tmp_path / "all", 2, names={"red": name})
    data = load_training_data(Recipe.load(recipe), tmp_path / "all")
    assert data.recipe.labels == ("2", "9", "10")


def test_mean_and_deviation_are_those_of_the_pixels() -> None:
    pixels = torch.randint(0, 256, (300, 3, 5, 4), generator=torch.Generator().manual_seed(0))
    mean, std = measure_channels(pixels.to(torch.uint8))
    values = pixels.double().numpy() / 255
    np.testing.assert_allclose(mean, values.mean((0, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(std, values.std((0, 2, 3)), atol=1e-4)


def _splits(folder: Path) -> Path:
    write_pictures(folder / "train", 1)
    write_pictures(folder / "val", 1)
    return folder


def _one_class(folder: Path) -> Path:
    return write_pictures(folder, 3, names={"red": "red"})


def _broken(folder: Path) -> Path:
    write_pictures(folder, 4)
    (folder / "red" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    return folder


def _empty_class(folder: Path) -> Path:
    write_pictures(folder, 2)
    (folder / "yellow").mkdir()
    return folder


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: folder, "expected a folder or a CSV file"),
        (_splits, "got the splits ['train', 'val']"),
        (_one_class, "expected at least two classes"),
        (_broken, "broken.png"),
        (_empty_class, "yellow: expected PNG or JPEG files"),
    ],
    ids=["missing", "splits", "one-class", "broken", "empty-class"],
)
def test_wrong_pictures_are_refused(
    write: Callable[[Path], Path], message: str, tmp_path: Path, recipe: Path
) -> None:
    source = write(tmp_path / "photos")
    said = ladderstitch("train", recipe, "--data", source, "--run", tmp_path / "run", fails=True)
    assert message.replace(" ", "") in said.replace(" ", "")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((30, 20, 20), [0, 1], "got [30, 20, 20]"),
        ((30, 8, 8, 3), [0, 1], "got [30, 8, 8, 3]"),
        ((30, 8, 8), [0, 5], "expected labels below 2"),
        ((28, 8, 8), [0, 1], "expected 28 labels"),
        ((0, 8, 8), [], "no image"),
    ],
    ids=["size", "colour", "label", "count", "empty"],
)
@pytest.mark.parametrize("command", ["train", "calibrate", "quantize"])
def test_idx_files_that_do_not_fit_are_refused(
    command: str, shape: tuple[int, ...], labels: list[int], message: str, tmp_path: Path
) -> None:
    from tests.conftest import make_tiny_bundle
    from tests.training.vision.test_pipeline import RECIPE as GREY

    bundle = make_tiny_bundle(tmp_path / "tiny")
    inputs = bundle.manifest.preprocessing
    side, count = inputs.height, len(bundle.manifest.labels)
    if command == "train":
        side, count = 8, 2
    sized = tuple(side if size == 8 else size for size in shape)
    given = [count + 3 if label == 5 else label for label in labels]
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "t10k"):
        write_idx(data / f"{split}-images-idx3-ubyte.gz", np.zeros(sized))
        write_idx(data / f"{split}-labels-idx1-ubyte.gz", np.resize(given, 30 if labels else 0))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(GREY))
    options = {
        "train": ("train", tmp_path / "recipe.yaml", "--run", tmp_path / "run"),
        "calibrate": ("calibrate", bundle.path),
        "quantize": ("quantize", bundle.path),
    }
    said = ladderstitch(*options[command], "--data", data, fails=True)
    expected = message.replace("8, 8", f"{side}, {side}").replace("below 2", f"below {count}")
    assert expected.replace(" ", "") in said.replace(" ", "")


def test_grey_idx_files_are_refused_for_colours(tmp_path: Path, recipe: Path) -> None:
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.zeros((9, 16, 16)))
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.resize([0, 1, 2], 9))
    labelled = Recipe.load(recipe).completed(num_classes=3, labels=("a", "b", "c"))
    with pytest.raises(DataError, match=r"model that takes \[3, 16, 16\], got \[9, 16, 16\]"):
        load_training_data(labelled, tmp_path)
    with pytest.raises(ConfigError, match=r"data\.labels: expected the names"):
        load_training_data(Recipe.load(recipe), tmp_path)


def test_run_with_other_pictures_is_refused(tmp_path: Path, recipe: Path) -> None:
    photos, run = write_pictures(tmp_path / "photos", 4), tmp_path / "run"
    ladderstitch("train", recipe, "--data", photos, "--run", run)
    log = (run / "anchor-0.log.jsonl").read_text()
    ladderstitch("train", recipe, "--data", photos, "--run", run)  # nothing is left to do
    assert (run / "anchor-0.log.jsonl").read_text() == log
    (photos / "red" / "0000.png").unlink()
    said = ladderstitch("train", recipe, "--data", photos, "--run", run, fails=True)
    assert "choose another folder" in said
    assert "digest" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--into", "Bad Name"), "name: expected lower-case"),
        (("--run", "run"), "recipe: expected a file, or --into"),
        ((), "run: expected a folder, or --into"),
        (("--into", "photos/red/0000.png"), "into: expected a folder"),
    ],
)
def test_options_are_checked_before_any_work(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "photos", 2)
    assert message in ladderstitch("train", "--data", "photos", *arguments, fails=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


def test_held_out_files_are_not_trained_on(tmp_path: Path, recipe: Path) -> None:
    photos, run = write_pictures(tmp_path / "photos", 10), tmp_path / "run"
    data = load_training_data(Recipe.load(recipe), photos)
    data.enter(run)
    with (run / "held-out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(data.validation) == 6
    assert {Path(row["path"]).parent.name == row["label"] for row in rows} == {True}
    assert len(data.train) + len(rows) == 30
    assert json.loads((run / "data.json").read_text())["labels"] == ["blue", "green", "red"]


def test_default_recipe_is_complete_but_for_the_pictures() -> None:
    recipe = Recipe.load(OWN_PICTURES)
    assert recipe.data.labels is None
    assert len(recipe.anchors) == len(recipe.family.anchors)
    assert len(recipe.completed(num_classes=5).family.stitches()) == 9


def test_layout_of_large_maps_is_safe(tmp_path: Path, recipe: Path) -> None:
    """Few channels on large maps ended the process while the layout was channels-last."""
    photos = write_pictures(tmp_path / "photos", 3)
    options = ("--run", tmp_path / "run", "--image-size", 64)
    ladderstitch("train", recipe, "--data", photos, *options)
    weights = load_file(tmp_path / "run" / "anchor-1.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())

"""Tests of making a family with grouped paths: as they are, retrained, in 8 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file

from ladderstitch.training.vision.dataset import load_idx_folder, normalise
from ladderstitch.training.vision.loop import groups_by_pair
from ladderstitch.training.vision.quantize import quantize
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.engine.startup import open_executor
from tests.support.grouped_resnets import IMAGE_SHAPE, grouped_config, write_grouped_bundle
from tests.training.vision.test_families import accuracies
from tests.training.vision.test_pipeline import RECIPE, ladderstitch, work_folder

__all__ = ["work_folder"]

ANCHOR = {"kind": "resnet", "block": "BasicBlock", "stem": "small", "width": 8}
FAMILY = {
    "family": "snnet-staged",
    "inputs": RECIPE["family"]["inputs"],  # type: ignore[index]
    "stages": [],
    "anchors": [ANCHOR | {"depths": [3, 1, 1, 1]}],
    "grouped_paths": [{"name": "shallow", "anchor": 0, "groups": [[[0, 3]], [], [], []]}],
}


def write_family(folder: Path) -> Path:
    """Write the recipe of a ResNet with a grouped path; return its file."""
    schedule = {"batch_size": 32, "learning_rate": 0.005}
    fields = RECIPE | {
        "precision": "float32",
        "family": FAMILY,
        "anchors": [schedule | {"epochs": 6}],
        "stitching": schedule | {"epochs": 2, "frozen_batch_norm": True, "sampling": "per_pair"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def test_groups_are_made_as_they_are_and_retrained(work_folder: Path) -> None:
    recipe, run = write_family(work_folder), work_folder / "run"
    pictures = work_folder / "pictures"
    pictures.mkdir()
    Image.new("L", (8, 8)).save(pictures / "blank.png")
    as_is, retrained = work_folder / "as-is", work_folder / "retrained"
    ladderstitch("train", recipe, "--data", work_folder, "--run", run)
    ladderstitch("stitch", recipe, "--images", pictures, "--run", run, "--bundle", as_is)
    ladderstitch("stitch", recipe, "--data", work_folder, "--run", run, "--bundle", retrained)
    anchor, family = load_file(run / "anchor-0.safetensors"), load_file(run / "family.safetensors")
    assert family.keys() == {f"anchors.0.{name}" for name in anchor}
    statistics = {name for name in anchor if "running" in name}
    changed = {
        name for name in anchor if not torch.equal(anchor[name], family[f"anchors.0.{name}"])
    }
    assert changed
    assert not changed & statistics
    before, after = accuracies(work_folder, as_is), accuracies(work_folder, retrained)
    assert before.keys() == after.keys() == {0, 1}
    assert min(before[0], after[0], after[1]) > 0.9
    images = load_idx_folder(work_folder, "t10k", (1, 8, 8), 2)
    batch = normalise(images.pixels, (0.4,), (0.3,))
    targets = VisionBundle.load(as_is).load_stitched()(batch, 0).softmax(1)
    losses = [
        F.cross_entropy(VisionBundle.load(bundle).load_stitched()(batch, 1), targets)
        for bundle in (as_is, retrained)
    ]
    assert losses[1] < losses[0]  # the path has learned the predictions of the anchor


def test_groups_by_pair_have_the_grouped_paths_of_their_anchors() -> None:
    assert groups_by_pair(grouped_config().build()) == [[0, 1, 2, 3]]
    anchors = [ANCHOR | {"depths": (2, 1, 1, 1), "width": width} for width in (4, 6, 8)]
    config = grouped_config(
        anchors=anchors,
        stages=[0],
        joints="after",
        stitched_pairs=[0],
        grouped_paths=[
            {"name": f"shallow-{anchor}", "anchor": anchor, "groups": [[[0, 2]], [], [], []]}
            for anchor in (1, 2)
        ],
    )
    # anchors 0 and 1 with their stitch 3 and path 4; anchor 2 with its path 5
    assert groups_by_pair(config.build()) == [[0, 1, 3, 4], [2, 5]]


def test_int8_groups_are_close_to_float32(tmp_path: Path) -> None:
    bundle = write_grouped_bundle(tmp_path, grouped_config())
    sample = np.random.default_rng(1).standard_normal((32, *IMAGE_SHAPE), np.float32)
    quantize(bundle, sample, lambda done, total: None)
    bundle = VisionBundle.load(tmp_path)
    assert (bundle.int8_folder / "group-0-1-2.onnx").exists()
    executor, count = open_executor(bundle, 1, lambda done, total: None), 4
    for stitch in bundle.manifest.config.stitches():
        exact, rounded = executor(sample, stitch.id), executor(sample, stitch.id + count)
        assert 0 < np.abs(rounded - exact).mean() / exact.std() < 0.12, stitch.name

"""Tests of making other families (by cost, low-rank, from a pool, hierarchical), on toy data."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ladderstitch.errors import ConfigError
from ladderstitch.training.vision.loop import draw_stitch, groups_by_cost, groups_by_pair
from ladderstitch.training.vision.recipe import Recipe
from ladderstitch.training.vision.stitching_layers import add_low_rank, fold_low_rank
from ladderstitch.vision.bundle import VisionBundle
from tests.conftest import tiny_config
from tests.training.vision.test_pipeline import RECIPE, ladderstitch, make, work_folder

__all__ = ["work_folder"]

ANCHORS = RECIPE["family"]["anchors"]  # type: ignore[index]
POOL = {
    "teacher": ANCHORS[1] | {"depth": 4},
    "schedule": {"epochs": 4, "batch_size": 32, "learning_rate": 0.01},
}


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Write the toy recipe with changes; nested fields are merged. Return the folder."""
    fields: dict[str, Any] = copy.deepcopy(RECIPE)
    for name, value in changes.items():
        fields[name] = fields[name] | value if isinstance(fields.get(name), dict) else value
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields))
    return folder


def accuracies(folder: Path, bundle: Path) -> dict[int, float]:
    """Calibrate a bundle; return the accuracy of every stitch."""
    ladderstitch("calibrate", bundle, "--data", folder, "--name", "toy test")
    quality = VisionBundle.load(bundle).quality
    assert quality is not None
    return {stitch: score.value for stitch, score in quality.variants.items()}


def test_hierarchical_anchors_are_trained_and_stitched(work_folder: Path) -> None:
    family = {
        "family": "snnet-staged",
        "inputs": RECIPE["family"]["inputs"] | {"image_size": 8},  # type: ignore[index]
        "stages": [1, 2],
        "anchors": [
            {"kind": "resnet", "block": "BasicBlock", "depths": [1, 1, 1, 1], "width": 8},
            {"kind": "resnet", "block": "BasicBlock", "depths": [1, 2, 2, 1], "width": 12},
        ],
    }
    folder = write_recipe(
        work_folder,
        precision="float32",
        stitching={"sampling": "by_cost", "cost_step_macs": 1000.0},
    )
    fields = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"family": family}
    fields["anchors"] = [{"epochs": 12, "batch_size": 32, "learning_rate": 0.005}] * 2
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields))
    bundle = make(folder, "resnet")
    assert VisionBundle.load(bundle).manifest.family == "snnet-staged"
    found = accuracies(folder, bundle)
    assert len(found) == 2 + 1 + 1
    assert max(found[0], found[1]) > 0.9  # after few steps, running statistics lag


def test_snnetv2_low_rank_is_trained_and_folded(work_folder: Path) -> None:
    anchors = [ANCHORS[0], ANCHORS[1] | {"depth": 4}]
    folder = write_recipe(
        work_folder,
        family={"family": "snnetv2", "anchors": anchors},
        stitching={"low_rank": 2},
    )
    fields = yaml.safe_load((folder / "recipe.yaml").read_text())
    del fields["family"]["final_norm_on_stitches"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields))
    bundle = make(folder, "v2")
    found = accuracies(folder, bundle)
    assert 3 not in found  # not usable: its last segment is empty
    assert min(found.values()) > 0.85
    started = load_file(folder / "v2" / "family.safetensors")
    assert not any("lora" in name or "parametrizations" in name for name in started)


def test_learngene_pool_trains_teacher_and_maps(work_folder: Path) -> None:
    folder = write_recipe(
        work_folder,
        pool=POOL,
        family={"trained_pairs": [[0, 1]]},
    )
    bundle = make(folder, "pool")
    assert (folder / "pool" / "teacher.safetensors").exists()
    maps = load_file(folder / "pool" / "anchor-0.maps.safetensors")
    assert maps["blocks.1.weight"].shape == (12, 8)
    assert min(accuracies(folder, bundle).values()) > 0.85


def test_assemble_pool_initialises_layers_from_maps(work_folder: Path) -> None:
    from ladderstitch.training.vision.dataset import load_idx_folder
    from ladderstitch.training.vision.stitch import assemble

    folder = write_recipe(work_folder, pool=POOL)
    ladderstitch("train", folder / "recipe.yaml", "--data", folder, "--run", folder / "run")
    images = load_idx_folder(folder, "train", (1, 8, 8), 2)
    model = assemble(Recipe.load(folder / "recipe.yaml"), images.pixels, folder / "run")
    maps = load_file(folder / "run" / "anchor-0.maps.safetensors")
    expected = (maps["blocks.0.weight"] + maps["blocks.1.weight"]) / 2
    torch.testing.assert_close(model.affine("stitch_layers.0.0.transform").weight.data, expected)


def test_recipe_pool_with_wrong_depth_raises(work_folder: Path) -> None:
    teacher = POOL["teacher"] | {"depth": 3}  # type: ignore[operator]
    folder = write_recipe(work_folder, pool=POOL | {"teacher": teacher})
    with pytest.raises(ConfigError, match="pool: expected vision transformers whose depths divide"):
        Recipe.load(folder / "recipe.yaml")


def test_frozen_batch_norm_keeps_the_statistics_of_the_anchors(work_folder: Path) -> None:
    write_recipe(work_folder, stitching={"sampling": "per_pair", "frozen_batch_norm": True})
    make(work_folder, "run")
    family = load_file(work_folder / "run" / "family.safetensors")
    changed = 0
    for number in range(2):
        anchor = load_file(work_folder / "run" / f"anchor-{number}.safetensors")
        statistics = [name for name in anchor if "running" in name]
        assert statistics
        for name in statistics:
            torch.testing.assert_close(family[f"anchors.{number}.{name}"], anchor[name])
        changed += sum(not torch.equal(family[f"anchors.{number}.{n}"], anchor[n]) for n in anchor)
    assert changed  # the weights were trained


def test_groups_by_pair_have_both_anchors_and_their_stitches() -> None:
    config = tiny_config()
    groups = groups_by_pair(config.build())
    stitches = {stitch.id: stitch for stitch in config.stitches()}
    assert len(groups) == len(config.anchors) - 1
    assert {stitch for group in groups for stitch in group} == stitches.keys()
    for front, group in enumerate(groups):
        anchors = [{segment.anchor for segment in stitches[i].segments} for i in group]
        assert {front} in anchors
        assert {front + 1} in anchors
        assert all(found <= {front, front + 1} for found in anchors)


def test_groups_by_cost_span_one_step() -> None:
    macs = {0: 100, 1: 500, 2: 150, 3: 199, 4: 201, 5: 900}
    assert groups_by_cost(macs, 100) == [[0, 2, 3], [4], [1], [5]]
    rng = torch.Generator().manual_seed(0)
    drawn = [draw_stitch(groups_by_cost(macs, 100), rng) for _ in range(4000)]
    assert abs(drawn.count(5) / 4000 - 1 / 4) < 0.03
    assert abs(drawn.count(2) / 4000 - 1 / 12) < 0.02


def test_low_rank_update_starts_at_zero_and_folds() -> None:
    model = tiny_config(anchors=2).build()
    images = torch.randn(2, 1, 8, 8)
    before = model(images, 3)
    add_low_rank(model, 2)
    torch.testing.assert_close(model(images, 3), before)
    trained = [name for name, p in model.stitch_layers.named_parameters() if p.requires_grad]
    assert {name.rpartition(".")[2] for name in trained} == {"bias", "lora_A", "lora_B"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_()
    changed = model(images, 3)
    assert (changed - before).abs().max() > 1e-3
    fold_low_rank(model)
    torch.testing.assert_close(model(images, 3), changed)
    assert model.state_dict().keys() == tiny_config(anchors=2).build().state_dict().keys()
    with pytest.raises(ConfigError, match=r"low_rank: expected less than 8.* got 8"):
        add_low_rank(model, 8)

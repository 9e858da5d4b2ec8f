"""Making other families: by cost, by low rank, from a pool, hierarchical; on a toy data set."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ladderstitch.errors import ConfigError
from ladderstitch.training.vision.loop import draw, groups_by_cost
from ladderstitch.training.vision.recipe import Recipe
from ladderstitch.training.vision.stitching_layers import add_low_rank, fold_low_rank
from ladderstitch.vision.bundle import Bundle
from tests.conftest import tiny_config
from tests.training.vision.test_making import RECIPE, ladderstitch, make, workplace

__all__ = ["workplace"]

ANCHORS = RECIPE["family"]["anchors"]  # type: ignore[index]
POOL = {
    "teacher": ANCHORS[1] | {"depth": 4},
    "schedule": {"epochs": 4, "batch_size": 32, "learning_rate": 0.01},
}


def recipe(place: Path, **changes: Any) -> Path:
    fields: dict[str, Any] = copy.deepcopy(RECIPE)
    for name, value in changes.items():
        fields[name] = fields[name] | value if isinstance(fields.get(name), dict) else value
    (place / "recipe.yaml").write_text(yaml.safe_dump(fields))
    return place


def accuracies(place: Path, bundle: Path) -> dict[int, float]:
    ladderstitch("calibrate", bundle, "--data", place, "--name", "toy test")
    quality = Bundle.load(bundle).quality
    assert quality is not None
    return {stitch: score.value for stitch, score in quality.variants.items()}


def test_hierarchical_networks_are_trained_and_stitched(workplace: Path) -> None:
    family = {
        "family": "snnet-staged",
        "inputs": RECIPE["family"]["inputs"] | {"image_size": 8},  # type: ignore[index]
        "stages": [1, 2],
        "anchors": [
            {"kind": "resnet", "block": "BasicBlock", "depths": [1, 1, 1, 1], "width": 8},
            {"kind": "resnet", "block": "BasicBlock", "depths": [1, 2, 2, 1], "width": 12},
        ],
    }
    place = recipe(
        workplace, precision="float32", stitching={"sampling": "by_cost", "cost_step_macs": 1000.0}
    )
    fields = yaml.safe_load((place / "recipe.yaml").read_text()) | {"family": family}
    fields["anchors"] = [{"epochs": 12, "batch_size": 32, "learning_rate": 0.005}] * 2
    (place / "recipe.yaml").write_text(yaml.safe_dump(fields))
    bundle = make(place, "resnet")
    assert Bundle.load(bundle).manifest.family == "snnet-staged"
    found = accuracies(place, bundle)
    assert len(found) == 2 + 1 + 1
    assert max(found[0], found[1]) > 0.9  # so few steps leave running statistics behind


def test_both_ways_and_low_rank(workplace: Path) -> None:
    anchors = [ANCHORS[0], ANCHORS[1] | {"depth": 4}]
    place = recipe(
        workplace,
        family={"family": "snnetv2", "anchors": anchors},
        stitching={"low_rank": 2},
    )
    fields = yaml.safe_load((place / "recipe.yaml").read_text())
    del fields["family"]["final_norm_on_stitches"]
    (place / "recipe.yaml").write_text(yaml.safe_dump(fields))
    bundle = make(place, "v2")
    found = accuracies(place, bundle)
    assert 3 not in found  # all of the small one, then nothing
    assert min(found.values()) > 0.85
    started = load_file(place / "v2" / "family.safetensors")
    assert not any("lora" in name or "parametrizations" in name for name in started)


def test_a_learngene_pool(workplace: Path) -> None:
    place = recipe(
        workplace,
        pool=POOL,
        family={"trained_pairs": [[0, 1]]},
    )
    bundle = make(place, "pool")
    assert (place / "pool" / "teacher.safetensors").exists()
    maps = load_file(place / "pool" / "anchor-0.maps.safetensors")
    assert maps["blocks.1.weight"].shape == (12, 8)
    assert min(accuracies(place, bundle).values()) > 0.85


def test_stitches_of_a_pool_start_from_its_maps(workplace: Path) -> None:
    from ladderstitch.training.vision.dataset import load_idx_folder
    from ladderstitch.training.vision.stitch import assemble

    place = recipe(workplace, pool=POOL)
    ladderstitch("train", place / "recipe.yaml", "--data", place, "--run", place / "run")
    model = assemble(
        Recipe.load(place / "recipe.yaml"), load_idx_folder(place, "train"), place / "run"
    )
    maps = load_file(place / "run" / "anchor-0.maps.safetensors")
    expected = (maps["blocks.0.weight"] + maps["blocks.1.weight"]) / 2
    torch.testing.assert_close(model.affine("stitch_layers.0.0.transform").weight.data, expected)


def test_a_pool_of_something_else_is_refused(workplace: Path) -> None:
    teacher = POOL["teacher"] | {"depth": 3}  # type: ignore[operator]
    place = recipe(workplace, pool=POOL | {"teacher": teacher})
    with pytest.raises(ConfigError, match="pool: expected vision transformers whose depths divide"):
        Recipe.load(place / "recipe.yaml")


def test_groups_span_a_step_of_cost() -> None:
    macs = {0: 100, 1: 500, 2: 150, 3: 199, 4: 201, 5: 900}
    assert groups_by_cost(macs, 100) == [[0, 2, 3], [4], [1], [5]]
    rng = torch.Generator().manual_seed(0)
    drawn = [draw(groups_by_cost(macs, 100), rng) for _ in range(4000)]
    assert abs(drawn.count(5) / 4000 - 1 / 4) < 0.03
    assert abs(drawn.count(2) / 4000 - 1 / 12) < 0.02


def test_a_low_rank_update_starts_at_nothing_and_folds_into_the_matrix() -> None:
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

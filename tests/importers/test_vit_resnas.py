"""Tests of ViT-ResNAS against an independent network that masks instead of slicing."""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from safetensors.torch import save_file

from ladderstitch.errors import BundleError, ConfigError
from ladderstitch.importers.import_bundle import BundleInfo
from ladderstitch.importers.import_nested import import_supernet
from ladderstitch.importers.nested_families import import_nested, read_nested, released_config
from ladderstitch.training.vision.recalibrate import needs_statistics
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.engine.nested import NestedExecutor
from ladderstitch.vision.models.nested.cost import path_costs
from ladderstitch.vision.models.nested.graphs import export_path, path_file
from ladderstitch.vision.models.nested.model import NestedModel
from tests.support.masked_vit import (
    Network,
    Weights,
    masked_logits,
    random_network,
    random_weights,
    small_network,
)

INFO = BundleInfo("net", "none")
SIZES = {"image_size": 16, "in_channels": 1, "num_classes": 5, "patch_size": 4}
EMBEDDINGS = {"patches": (0, 16), "convolutions": (4, 16), "narrow": (5, 16, 6)}


def make_case(
    first: tuple[int, ...], count: int, dtype: torch.dtype
) -> tuple[NestedModel, Weights, list[Network]]:
    """Return a supernet with random paths, its weights and the paths in upstream's form."""
    net, rng = small_network(first), random.Random(4)
    paths = [net, *(random_network(net, rng) for _ in range(count - 1))]
    config = SIZES | {"network_def": net}
    family = read_nested("vit-resnas", config, [{"network_def": str(path)} for path in paths])
    weights = random_weights(net, SIZES["image_size"], SIZES["patch_size"])
    model = import_nested("vit-resnas", family, weights).to(dtype)
    weights = {name: t.to(dtype) if t.is_floating_point() else t for name, t in weights.items()}
    return model, weights, paths


@pytest.mark.parametrize("first", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_paths_equal_the_masked_network(first: tuple[int, ...]) -> None:
    model, weights, paths = make_case(first, 60, torch.float64)
    images = torch.randn(3, 1, 16, 16, dtype=torch.float64)
    for number, path in enumerate(paths):
        wanted = masked_logits(weights, path, images)
        torch.testing.assert_close(model(images, number), wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("embedding", "count"), [("patches", 2), ("convolutions", 4)])
def test_sessions_equal_the_masked_network(embedding: str, count: int, tmp_path: Path) -> None:
    model, weights, paths = make_case(EMBEDDINGS[embedding], count, torch.float32)
    for number in range(len(paths)):
        onnx.save(export_path(model, number), path_file(tmp_path, number))
    executor = NestedExecutor(model, tmp_path, 1, 0)
    images = torch.randn(3, 1, 16, 16)
    for number, path in enumerate(paths):
        wanted = masked_logits(weights, path, images).numpy()
        np.testing.assert_allclose(executor(images.numpy(), number), wanted, atol=1e-4, rtol=1e-3)
    executor.close()


def write_checkpoint(folder: Path, weights: Weights) -> Path:
    """Write a checkpoint as upstream's training does."""
    path = folder / "checkpoint.pth.tar"
    torch.save({"model": weights, "epoch": 119, "args": argparse.Namespace(lr=1e-3)}, path)
    return path


def write_config(folder: Path, **changed: object) -> Path:
    """Write the configuration of the small supernet, with changed fields."""
    path = folder / "config.json"
    path.write_text(json.dumps(SIZES | {"network_def": str(small_network())} | changed))
    return path


def test_import_reads_upstreams_checkpoint_and_listed_networks(tmp_path: Path) -> None:
    net = small_network()
    # weights of bundles have half precision
    weights = {
        name: tensor.half().float() if tensor.is_floating_point() else tensor
        for name, tensor in random_weights(net, 16, 4).items()
    }
    checkpoint = write_checkpoint(tmp_path, weights)
    rng = random.Random(2)
    networks = [random_network(net, rng) for _ in range(3)]
    plain = {"name": "plain", "widths": [8, 24, 24], "heads": [2] * 5, "hidden": [9] * 5}
    listed = [{"name": f"searched-{n}", "network_def": net} for n, net in enumerate(networks)]
    config = write_config(tmp_path, paths=[*listed, plain])
    model = import_supernet("vit-resnas", checkpoint, config, INFO, tmp_path / "net")
    names = [stitch.name for stitch in model.stitches]
    assert names == ["searched-0", "searched-1", "searched-2", "plain"]
    bundle = VisionBundle.load(tmp_path / "net")
    assert "patch_head.weight" not in bundle.load_nested().state_dict()
    images = torch.randn(2, 1, 16, 16)
    for number, network in enumerate(networks):
        wanted = masked_logits(weights, network, images)
        torch.testing.assert_close(bundle.load_nested()(images, number), wanted, atol=1e-4, rtol=0)


def test_paths_share_the_statistics_of_batch_normalisation(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, random_weights(small_network(), 16, 4))
    import_supernet("vit-resnas", checkpoint, write_config(tmp_path), INFO, tmp_path / "net")
    bundle = VisionBundle.load(tmp_path / "net")
    model = bundle.load_nested()
    assert not needs_statistics(bundle)
    model.recalibrate(0, [torch.randn(4, 1, 16, 16)])
    assert 0 not in model.statistics
    assert model.norm_widths(0) == {}


def test_import_names_tensors_of_another_network(tmp_path: Path) -> None:
    def run(weights: Weights, **changed: object) -> None:
        checkpoint = write_checkpoint(tmp_path, weights)
        config = write_config(tmp_path, **changed)
        import_supernet("vit-resnas", checkpoint, config, INFO, tmp_path / "net", paths=2)

    weights = random_weights(small_network(), 16, 4)
    with pytest.raises(BundleError, match=r"patch_embed\.proj\.weight"):
        run(weights, network_def=small_network((0, 16)))
    with pytest.raises(BundleError, match=r"cls_head\.weight: expected .*7, 40"):
        run(weights, network_def=small_network(classes=7), num_classes=7)
    missing = {name: t for name, t in weights.items() if name != "blocks.2.pos_embed"}
    with pytest.raises(BundleError, match=r"blocks\.2\.pos_embed"):
        run(missing)
    save_file({"head.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="expected a file for this vit-resnas"):
        import_supernet("vit-resnas", tmp_path / "other.safetensors", None, INFO, tmp_path / "net")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"network_def": "((4, 16), (2, 16"}, "got text that is none"),
        ({"network_def": "[" * 5000}, "got text that is none"),
        ({"network_def": "(" * 30000}, "at most 20000 characters"),
        ({"network_def": 7}, r"network_def: expected .*, got 7"),
        ({"network_def": [[4, 16]]}, "network_def: expected"),
        ({"network_def": [[4, 16], [1, [16, 2], [16, 8], 1], [2, 16, 5]]}, r"network_def\[1\]"),
        ({"network_def": [[3, 16, 24], [2, 24, 5]]}, "got .* at first"),
        ({"network_def": [[4, 16], [2, 16, 5]]}, "blocks in every stage"),
        ({"network_def": [[4, 16], [2, 16, 5], [2, 16, 5]]}, "a block or a reduction"),
        (
            {"network_def": [[4, 16], [1, [16, 1, 4], [24, 8], 1], [2, 16, 5]]},
            r"network_def\[1\]: expected width 16, got 24",
        ),
        (
            {"network_def": [[4, 16], [1, [16, 1, 4], [16, 8], 0], [2, 16, 5]]},
            "a supernet in which every block runs",
        ),
        ({"num_classes": 9}, "num_classes: expected 5, got 9"),
        ({"distill_token": True}, "distill_token: expected False"),
        ({"image_size": 24}, "image_size: expected a multiple of 16, got 24"),
        ({"patch_size": 7}, "patch_size: expected an even number, got 7"),
        ({"width_choices": [[8]]}, "width_choices: expected 3 lists, got 1"),
        ({"head_choices": [[1], [2, 1], [1]]}, "head_choices: expected ascending lists"),
        ({"head_choices": [[1], [9], [1]]}, r"paths\.heads\[2\]: expected 1 to 2, got 9"),
        ({"skippable": [5]}, "skippable: expected positions from 0 to 4, got 5"),
        ({"skippable": "all"}, "skippable"),
    ],
)
def test_wrong_configurations_are_named(changed: dict[str, object], message: str) -> None:
    config = SIZES | {"network_def": small_network()} | changed
    with pytest.raises(ConfigError, match=message):
        read_nested("vit-resnas", config, 3)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ({"network_def": (*small_network()[:2], *small_network()[3:])}, "0 at their end"),
        ({"network_def": small_network((4, 16))}, "expected stem_width 6, got 24"),
        ({"network_def": small_network(classes=4)}, "expected num_classes 5, got 4"),
        ({"widths": [16, 12, 40], "heads": [1] * 5, "hidden": [1] * 5}, "no fewer channels"),
        ({"widths": [16, 24], "heads": [1] * 5, "hidden": [1] * 5}, "widths: expected 3 values"),
        (
            {"widths": [8, 9, 10], "heads": [4] * 5, "hidden": [1] * 5},
            r"heads\[0\]: expected 1 to 3",
        ),
        (
            {"widths": [8, 9, 10], "heads": [1] * 5, "hidden": [1] * 5, "skipped": [-1]},
            "skipped: expected positions from 0 to 4, got -1",
        ),
        (7, "paths"),
    ],
)
def test_wrong_paths_are_named(path: object, message: str) -> None:
    config = SIZES | {"network_def": small_network()}
    with pytest.raises(ConfigError, match=message):
        read_nested("vit-resnas", config, [path])


@pytest.mark.parametrize(("width", "blocks"), [(256, 18), (320, 21)])
def test_published_supernets_follow_from_their_width(width: int, blocks: int) -> None:
    fields = released_config("vit-resnas", {"tokens": torch.empty(1, 1, width)})
    config = read_nested("vit-resnas", fields, 16)
    assert len(config.net.paths) == 16
    smallest, largest = config.net.paths[0], config.net.paths[-1]
    assert largest.widths == (width, 2 * width, 4 * width)
    assert largest.hidden == tuple(3 * w for w in largest.widths for _ in range(blocks // 3))
    assert smallest.widths == tuple(width * n * 5 // 8 for n in (1, 2, 4))
    assert (len(smallest.skipped), largest.skipped) == (9, ())
    with pytest.raises(ConfigError, match="expected a file for this vit-resnas"):
        released_config("vit-resnas", {"tokens": torch.empty(1, 1, 192)})


def test_costs_follow_from_the_weights() -> None:
    net = small_network()
    skipping = tuple((*entry[:3], 0) if n == 2 else entry for n, entry in enumerate(net))
    paths = [{"network_def": net}, {"network_def": skipping}]
    costs = path_costs(read_nested("vit-resnas", SIZES | {"network_def": net}, paths))
    of_training = ("patch_head", "running_", "num_batches")
    weights = {
        name: tensor.numel()
        for name, tensor in random_weights(net, 16, 4).items()
        if not any(part in name for part in of_training)
    }
    assert costs[0].parameters == sum(weights.values())
    block = sum(number for name, number in weights.items() if name.startswith("blocks.1."))
    assert costs[0].parameters - costs[1].parameters == block
    tokens, width, inner, hidden = 17, 16, 12, 24
    macs = tokens * (4 * width * inner + 2 * width * hidden) + 2 * tokens**2 * inner
    assert costs[0].macs - costs[1].macs == macs + 2 * 5 * tokens * width


def test_the_documented_paths_are_one_network() -> None:
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    (block,) = (part for part in re.findall(r"```yaml\n(.*?)```", text, re.S) if "plain" in part)
    config = yaml.safe_load(block)
    searched, plain = read_nested("vit-resnas", config, config.pop("paths")).net.paths
    assert searched.model_copy(update={"name": "plain"}) == plain

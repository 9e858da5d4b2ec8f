"""Tests of groups of blocks that read one input: arithmetic, serving forms, errors, cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ladderstitch.errors import BundleError
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.engine.startup import open_executor
from ladderstitch.vision.models.cost import stitch_cost
from ladderstitch.vision.models.efficientnet import EfficientNetLiteConfig, InvertedResidual
from ladderstitch.vision.models.executor import StitchExecutor
from ladderstitch.vision.models.graphs import route_units
from ladderstitch.vision.models.parallel import BranchBlock, ParallelGroup, find_serving_part
from ladderstitch.vision.models.route import Segment
from ladderstitch.vision.models.snnet_staged import StagedConfig
from tests.support.grouped_resnets import (
    IMAGE_SHAPE,
    BlockKind,
    bundle_logits,
    grouped_config,
    reference_logits,
    write_grouped_bundle,
)
from tests.vision.models.test_families import build_with_random_norms

blocks = pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])


def images(count: int = 3) -> Tensor:
    """Return random images of the family."""
    return torch.randn(count, *IMAGE_SHAPE, generator=torch.Generator().manual_seed(1))


def path_name(name: str) -> str | None:
    """Return the name of a grouped path, or None for the anchor."""
    return None if name == "anchor-0" else name


@blocks
def test_paths_equal_the_reference_in_float64(block: BlockKind) -> None:
    model = build_with_random_norms(grouped_config(block)).double()
    tensors, batch = dict(model.state_dict()), images().double()
    expected = {s.id: reference_logits(tensors, batch, path_name(s.name)) for s in model.stitches}
    for stitch in model.stitches:
        torch.testing.assert_close(model(batch, stitch.id), expected[stitch.id], rtol=0, atol=1e-11)
    model.fold_batch_norm()
    for stitch in model.stitches:
        torch.testing.assert_close(model(batch, stitch.id), expected[stitch.id], rtol=0, atol=1e-10)
    assert (expected[0] - expected[2]).abs().max() > 0.01  # groups are another function


@blocks
def test_serving_forms_equal_the_reference(block: BlockKind, tmp_path: Path) -> None:
    bundle = write_grouped_bundle(tmp_path, grouped_config(block))
    batch, eager = images(), StitchExecutor(bundle.load_stitched())
    compiled = open_executor(bundle, 1, lambda done, total: None)
    stitches = bundle.manifest.config.stitches()
    wanted = {s.id: bundle_logits(bundle, batch, path_name(s.name)).numpy() for s in stitches}
    with torch.inference_mode():
        found = {s.id: eager(batch, s.id).numpy() for s in stitches}
    for stitch in stitches:
        np.testing.assert_allclose(found[stitch.id], wanted[stitch.id], atol=2e-5)
        np.testing.assert_allclose(compiled(batch.numpy(), stitch.id), wanted[stitch.id], atol=2e-5)
    joined = compiled.join(wanted)
    assert joined == list(wanted)
    for stitch in joined:
        np.testing.assert_allclose(compiled(batch.numpy(), stitch), wanted[stitch], atol=2e-5)


@blocks
def test_groups_of_one_block_have_the_bits_of_the_anchor(block: BlockKind, tmp_path: Path) -> None:
    bundle = write_grouped_bundle(tmp_path, grouped_config(block))
    anchor, single = (
        next(s for s in bundle.manifest.config.stitches() if s.name == name)
        for name in ("anchor-0", "single")
    )
    assert not single.is_anchor
    model, batch = bundle.load_stitched(), images()
    compiled = open_executor(bundle, 1, lambda done, total: None)
    with torch.inference_mode():
        for run in (model, StitchExecutor(model)):
            assert torch.equal(run(batch, single.id), run(batch, anchor.id))
    pixels = batch.numpy()
    np.testing.assert_array_equal(compiled(pixels, single.id), compiled(pixels, anchor.id))


def test_group_is_a_unit_of_its_own() -> None:
    routes = {stitch.name: route_units(stitch) for stitch in grouped_config().stitches()}
    assert routes["single"] == routes["anchor-0"]
    assert "group-0-7-2" in routes["pair"]
    assert not {"block-0-7", "block-0-8"} & set(routes["pair"])
    assert set(routes["pair"]) - {"group-0-7-2"} < set(routes["anchor-0"])
    assert len(routes["wide"]) == len(routes["anchor-0"]) - 1 - 2


def test_paths_add_no_weights() -> None:
    with torch.device("meta"):
        grouped, plain = (
            config.build() for config in (grouped_config(), grouped_config(grouped_paths=[]))
        )
    assert grouped.state_dict().keys() == plain.state_dict().keys()


@blocks
def test_path_costs_what_torch_counts(block: BlockKind) -> None:
    model = build_with_random_norms(grouped_config(block))
    model.fold_batch_norm()
    executor, anchor = StitchExecutor(model), stitch_cost(model, model.stitches[0], 16)
    for stitch in model.stitches:
        cost = stitch_cost(model, stitch, 16)
        assert cost == anchor  # no product is saved
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            executor(images(1), stitch.id)
        assert abs(cost.macs - counter.get_total_flops() / 2) < 0.01 * cost.macs


@pytest.mark.parametrize("stage", [0, 1])
def test_group_of_inverted_residuals_adds_their_branches(stage: int) -> None:
    torch.manual_seed(0)
    members = [InvertedResidual(8, 8, stage, 1).eval().requires_grad_(False) for _ in range(3)]
    x = torch.randn(2, 8, 7, 7)
    unfolded = ParallelGroup(members)(x)
    for member in members:
        member.fold_batch_norm()
    expected = x.double()
    for member in members:
        y = x.double()
        for name, padding, groups in (("expand", 0, 1), ("depthwise", 1, 0), ("project", 0, 1)):
            conv = getattr(member, f"_{name}_conv", None)
            if conv is not None:
                weight, bias = conv.weight.double(), conv.bias.double()
                y = F.conv2d(y, weight, bias, padding=padding, groups=groups or y.shape[1])
                y = y.clamp(0, 6) if name != "project" else y
        expected = expected + y
    serving = find_serving_part(members, 0, 3)
    # the first stage has no expansion, so that its blocks begin with a convolution per channel
    assert isinstance(serving, ParallelGroup if stage == 0 else InvertedResidual)
    for found in (unfolded, serving(x)):
        torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)


def test_first_blocks_that_keep_the_shape_may_be_in_groups() -> None:
    lite = EfficientNetLiteConfig(
        widths=(32, 24, 40, 80, 112, 192, 320), depths=(2, 1, 1, 1, 1, 1, 1)
    )
    assert [lite.first_residual(stage) for stage in range(7)] == [0, 1, 1, 1, 1, 1, 1]
    path = {"name": "pair", "anchor": 0, "groups": [[[0, 2]], [], [], [], [], [], []]}
    config = grouped_config(anchors=[lite], grouped_paths=[path])
    assert config.stitches()[1].segments == (Segment(0, 0, 7, ((0, 2),)),)
    basic = grouped_config(grouped_paths=[{**path, "groups": [[[0, 3]], [], [], []]}])
    assert basic.stitches()[1].segments[0].parts[:2] == ((0, 3), (3, 1))


def groups_of(stage: int, *groups: object) -> list[list[object]]:
    """Return the groups of one stage, and none of the others."""
    return [list(groups) if number == stage else [] for number in range(4)]


FITTING = "expected groups of at least 1 of blocks 1 to 3 in stage 2 that do not overlap"
WRONG = {
    "overlapping": (groups_of(2, [1, 2], [2, 2]), rf"p\.groups: {FITTING}.*got \[2, 2\]"),
    "first of a stage": (groups_of(2, [0, 2]), r"because block 0 changes the shape, got \[0, 2\]"),
    "beyond the stage": (groups_of(2, [2, 3]), rf"{FITTING}.*got \[2, 3\]"),
    "negative": (groups_of(2, [-1, 2]), rf"{FITTING}.*got \[-1, 2\]"),
    "empty": (groups_of(2, [1, 0]), rf"{FITTING}.*got \[1, 0\]"),
    "one block": (groups_of(3, [1, 1]), r"of no block in stage 3.*got \[1, 1\]"),
    "no group": ([[], [], [], []], r"p\.groups: expected at least one group, got none"),
    "too few lists": ([[], []], r"p\.groups: expected 4 lists, one per stage, got 2"),
    "no integer": (groups_of(2, [1, 2.5]), r"groups\.2\.0\.1\D.*valid integer.*2\.5"),
    "boolean": (groups_of(2, [True, 2]), r"groups\.2\.0\.0\D.*valid integer.*True"),
    "text": (groups_of(2, ["1", 2]), r"groups\.2\.0\.0\D.*valid integer.*'1'"),
    "one number": (groups_of(2, [1]), r"groups\.2\.0\.1\D.*Field required"),
}


@pytest.mark.parametrize(("groups", "message"), WRONG.values(), ids=WRONG.keys())
def test_groups_that_do_not_fit_are_rejected(groups: Any, message: str, tmp_path: Path) -> None:
    bundle = write_grouped_bundle(tmp_path, grouped_config())
    path = bundle.path / "model.yaml"
    fields = yaml.safe_load(path.read_text())
    fields["config"]["grouped_paths"] = [{"name": "p", "anchor": 0, "groups": groups}]
    path.write_text(yaml.safe_dump(fields))
    with pytest.raises(BundleError, match=f"(?s){message}"):
        VisionBundle.load(tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ({"anchor": 1}, r"p\.anchor: expected 0 to 0, got 1"),
        ({"anchor": -1}, r"greater than or equal to 0"),
        ({"name": "anchor-0"}, r"expected names that no other network has, got 'anchor-0'"),
        ({"name": "Wide"}, r"grouped_paths\.0\.name"),
    ],
)
def test_paths_that_do_not_fit_are_rejected(path: dict[str, Any], message: str) -> None:
    fields = {"name": "p", "anchor": 0, "groups": groups_of(2, [1, 2])} | path
    with pytest.raises(ValidationError, match=f"(?s){message}"):
        grouped_config(grouped_paths=[fields])


def test_path_of_an_anchor_on_tokens_is_rejected() -> None:
    swin = {"kind": "swin", "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2]}
    swin |= {"window_size": 2, "patch_size": 2}
    path = {"name": "p", "anchor": 0, "groups": [[[0, 2]], []]}
    with pytest.raises(ValidationError, match=r"p\.anchor: expected a resnet or.*got a swin"):
        grouped_config(anchors=[swin], grouped_paths=[path])


def test_stacked_blocks_are_copies(tmp_path: Path) -> None:
    model = write_grouped_bundle(tmp_path, grouped_config()).load_stitched()
    steps = model.backbones()[0].steps()
    before = model(images(), 0)
    wide = find_serving_part(steps, 1, 2)
    assert isinstance(wide, BranchBlock)
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.zero_()
    assert torch.equal(model(images(), 0), before)


def test_manifest_keeps_the_groups(tmp_path: Path) -> None:
    config = grouped_config()
    loaded = write_grouped_bundle(tmp_path, config).manifest.config
    assert isinstance(loaded, StagedConfig)
    assert loaded == config

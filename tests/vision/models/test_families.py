"""Tests of every family: networks, costs and folding, compared with the reference's lists."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from ladderstitch.errors import BundleError, ConfigError
from ladderstitch.importers.stitched_families import import_model, read_config
from ladderstitch.vision.models.cost import stitch_cost
from ladderstitch.vision.models.executor import StitchExecutor
from ladderstitch.vision.models.levit import LevitConfig
from ladderstitch.vision.models.resnet import ResNetConfig
from ladderstitch.vision.models.route import Segment, Stitch
from ladderstitch.vision.models.snnet_staged import StagedConfig, layer_count, stage_stitches
from ladderstitch.vision.models.stitched import Backbone, StitchedModel
from ladderstitch.vision.models.swin import Swin
from ladderstitch.vision.models.vit import Vit
from tests.conftest import GOLDEN

SHEETS = {
    path.stem: sheet
    for path in sorted(GOLDEN.glob("*.json"))
    if "ids" in (sheet := json.loads(path.read_text())) and "input" in str(sheet)
    if sheet["family"].startswith(("snnet", "learngene"))
}
sheets = pytest.mark.parametrize("sheet", SHEETS.values(), ids=SHEETS.keys())


def build_on_meta(sheet: dict[str, Any]) -> StitchedModel:
    """Return the model of a golden case without memory for its weights."""
    with torch.device("meta"):
        return read_config(sheet["family"], sheet["config"]).build()


def test_golden_cases_cover_every_family() -> None:
    assert {sheet["family"] for sheet in SHEETS.values()} == {
        "snnet-deit",
        "snnet-swin",
        "snnet-resnet",
        "snnet-resnet-swin",
        "snnet-levit",
        "snnetv2",
        "learngene-pool",
    }


@sheets
def test_stitches_equal_reference_list(sheet: dict[str, Any]) -> None:
    config = read_config(sheet["family"], sheet["config"])
    stitches = config.stitches()
    assert [stitch.id for stitch in stitches] == [expected["id"] for expected in sheet["ids"]]
    for stitch, expected in zip(stitches, sheet["ids"], strict=True):
        assert stitch.segments == tuple(expected_segments(config, expected))
        keys = [layer["key"] for layer in expected.get("stitch_layers", [])]
        if expected["kind"] == "stitch":
            keys = [expected["stitch_key"]]
        assert list(stitch.layers) == keys
        if "trained" in expected:
            assert stitch.usable == expected["trained"]
        elif expected.get("usable", True) != stitch.usable:
            assert stitch.segments[-1].last < stitch.segments[-1].first  # its last segment is empty


def expected_segments(config: Any, expected: dict[str, Any]) -> list[Segment]:
    """Return the segments of a network in the reference's list."""
    if "route" in expected:
        return [Segment(r["anchor"], r["first_block"], r["last_block"]) for r in expected["route"]]
    if expected["kind"] == "anchor":
        return [Segment(expected["anchor"], 0, count_steps(config, expected["anchor"]) - 1)]
    front, end = expected["front_anchor"], expected["end_anchor"]
    last, first = expected["last_front_block"], expected["first_end_block"]
    if "stage" in expected:
        last = config.anchors[front].span(expected["stage"], last)[1]
        first = config.anchors[end].span(expected["stage"], first)[0]
    return [Segment(front, 0, last), Segment(end, first, count_steps(config, end) - 1)]


def count_steps(config: Any, anchor: int) -> int:
    """Return the number of steps of an anchor."""
    shape = config.anchors[anchor]
    return shape.total_steps if isinstance(config, StagedConfig) else shape.depth


@sheets
def test_stitch_cost_equals_reference_counts(sheet: dict[str, Any]) -> None:
    model = build_on_meta(sheet)
    for stitch, expected in zip(model.stitches, sheet["ids"], strict=True):
        cost = stitch_cost(model, stitch, sheet["config"]["image_size"])
        assert cost.macs == expected["macs"], stitch
        if "params" in expected:
            assert cost.parameters == expected["params"] + uncounted_parameters(model, stitch), (
                stitch
            )


def uncounted_parameters(model: StitchedModel, stitch: Stitch) -> int:
    """Return the number of parameters that a stitch runs but upstream does not count."""
    front = model.backbones()[stitch.front]
    if stitch.is_anchor:
        return 0
    if isinstance(front, Vit):
        return front.cls_token.numel() + front.pos_embed.numel()
    assert isinstance(front, Swin)
    passed = list(front.steps())[: stitch.segments[0].last + 1]
    merges = [step for step in passed if hasattr(step, "reduction")]
    return sum(p.numel() for step in merges for p in step.parameters())


def test_stitch_cost_real_sizes_equals_published_counts() -> None:
    swin = [(96, (2, 2, 6, 2), (3, 6, 12, 24)), (96, (2, 2, 18, 2), (3, 6, 12, 24))]
    swin.append((128, (2, 2, 18, 2), (4, 8, 16, 32)))
    config = {
        "image_size": 224,
        "num_classes": 1000,
        "window_size": 7,
        "anchors": [{"embed_dim": d, "depths": b, "num_heads": h} for d, b, h in swin],
    }
    model = build_on_meta({"family": "snnet-swin", "config": config})
    assert len(model.stitches) == 41
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 170.0
    deit = {
        "image_size": 224,
        "num_classes": 1000,
        "kernel_size": 2,
        "stride": 1,
        "anchors": [{"embed_dim": d, "depth": 12, "num_heads": d // 64} for d in (192, 384, 768)],
    }
    model = build_on_meta({"family": "snnet-deit", "config": deit})
    gmacs = {i: stitch_cost(model, model.stitches[i], 224).macs / 1e9 for i in range(71)}
    published = {0: 1.26, 1: 4.61, 2: 17.58, 24: 2.76, 16: 3.21, 12: 3.87, 56: 10.05, 49: 13.66}
    assert {stitch: round(gmacs[stitch], 2) for stitch in published} == published
    assert round(gmacs[39], 2) == 18.34
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 118.4


def test_stage_stitches_unequal_depths_as_published() -> None:
    assert stage_stitches(6, 18)[:7] == [
        (0, 1, 0),
        (0, 2, 0),
        (1, 3, 0),
        (1, 4, 1),
        (1, 5, 1),
        (2, 6, 1),
        (2, 7, 2),
    ]
    assert stage_stitches(6, 18)[-2:] == [(5, 16, 5), (5, 17, 5)]
    assert stage_stitches(2, 2) == [(0, 1, 0)]
    assert (layer_count(6, 18), layer_count(18, 18)) == (6, 17)


def build_with_random_norms(config: Any) -> StitchedModel:
    """Return a model with random statistics and weights in its batch normalisation."""
    torch.manual_seed(0)
    model: StitchedModel = config.build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]  # tracked
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]  # tracked
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["snnet_resnet18_50", "snnet_resnet18_swin", "snnet_levit"])
def test_fold_batch_norm_keeps_logits_of_every_stitch(name: str) -> None:
    sheet = SHEETS[name]
    model = build_with_random_norms(read_config(sheet["family"], sheet["config"]))
    images = torch.randn(sheet["input_shape"])
    with torch.inference_mode():
        before = [model(images, stitch.id) for stitch in model.stitches]
        model.fold_batch_norm()
        serving = StitchExecutor(model)
        for stitch, expected in zip(model.stitches, before, strict=True):
            scale = expected.abs().max().clamp(min=1.0)
            assert (serving(images, stitch.id) - expected).abs().max() / scale < 1e-4
    modules = [m for b in model.backbones() for s in b.steps() for m in s.modules()]
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in modules)


def test_import_low_rank_stitches_folds_complete_pairs() -> None:
    sheet = SHEETS["snnetv2_4_8"]
    model = build_with_random_norms(read_config("snnetv2", sheet["config"]))
    tensors = dict(model.state_dict())
    layer = "stitch_layers.0.1.transform"
    down, up = torch.randn(4, 32), torch.randn(48, 4)
    loaded = import_model(
        "snnetv2",
        sheet["config"],
        tensors | {f"{layer}.lora_A": down, f"{layer}.lora_B": up},
    )
    expected = tensors[f"{layer}.weight"] + up @ down / 4
    torch.testing.assert_close(loaded.affine(layer).weight.data, expected)
    with pytest.raises(ConfigError, match=r"lora_A: expected 'stitch.*lora_B' in the same file"):
        import_model("snnetv2", sheet["config"], tensors | {f"{layer}.lora_A": down})
    tensors["anchors.0.extra"] = tensors.pop("anchors.0.norm.bias")
    with pytest.raises(BundleError, match=r"missing anchors.0.norm.bias; unknown anchors.0.extra"):
        import_model("snnetv2", sheet["config"], tensors)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stages": (3,)}, r"stages: expected stages 0 to 2 \(never the last\), got \(3,\)"),
        (
            {"swap": True},
            "anchors: expected the smaller one first, got 4 before 2 blocks in stage 1",
        ),
    ],
)
def test_staged_config_wrong_stages_raises(fields: dict[str, Any], message: str) -> None:
    small = ResNetConfig(block="BasicBlock", depths=(2, 2, 2, 2), width=8)
    large = ResNetConfig(block="Bottleneck", depths=(3, 4, 6, 3), width=8)
    anchors = (large, small) if fields.pop("swap", False) else (small, large)
    inputs = {"image_size": 32, "num_classes": 2}
    with pytest.raises(ValueError, match=message):
        StagedConfig.model_validate(
            {"inputs": inputs, "anchors": anchors, "stages": (1, 2)} | fields
        )


def four_resnets(**fields: Any) -> StagedConfig:
    """Return a family of four small ResNets that are stitched after their stages."""
    anchors = [
        {"kind": "resnet", "block": "BasicBlock", "depths": [1, 1, 1, 1], "width": width}
        for width in (2, 3, 4, 6)
    ]
    inputs = {"image_size": 32, "in_channels": 1, "num_classes": 3}
    shape = {"inputs": inputs, "anchors": anchors, "stages": [0, 2], "joints": "after"}
    return StagedConfig.model_validate(shape | fields)


def test_stitched_pairs_limit_the_stitches() -> None:
    some, every = four_resnets(stitched_pairs=[1]), four_resnets()
    assert [stitch.id for stitch in some.stitches()] == list(range(6))
    assert [s.segments for s in some.stitches() if not s.is_anchor] == [
        s.segments for s in every.stitches() if s.front == 1 and s.end == 2
    ]
    model = some.build().eval()
    layers = [name for name in model.state_dict() if name.startswith("stitch_layers")]
    assert {name.rpartition(".")[0] for name in layers} == {
        layer.rpartition(".transform")[0] + ".transform"
        for stitch in some.stitches()
        for layer in stitch.layers
        if layer is not None
    }
    images = torch.randn(2, 1, 32, 32)
    for stitch in some.stitches():
        assert model(images, stitch.id).shape == (2, 3)


@pytest.mark.parametrize("pair", [-1, 3])
def test_stitched_pairs_out_of_range_raise(pair: int) -> None:
    with pytest.raises(ValueError, match=f"stitched_pairs: expected 0 to 2, got {pair}"):
        four_resnets(stitched_pairs=[pair])


def test_staged_config_map_anchor_after_tokens_raises() -> None:
    sheet = SHEETS["snnet_levit"]
    levit = read_config("snnet-levit", sheet["config"]).anchors[0]
    assert isinstance(levit, LevitConfig)
    resnet = ResNetConfig(block="BasicBlock", depths=(4, 4, 4, 4), width=8)
    inputs = {"image_size": 128, "num_classes": 2}
    with pytest.raises(ValueError, match=r"after a levit \(tokens\), got a resnet \(maps\)"):
        StagedConfig.model_validate({"inputs": inputs, "anchors": (levit, resnet), "stages": (0,)})


def test_backbone_alone_equals_anchor_stitch() -> None:
    model = build_with_random_norms(read_config("snnet-swin", SHEETS["snnet_swin"]["config"]))
    images = torch.randn(2, 3, 128, 128)
    backbone = model.backbones()[1]
    assert isinstance(backbone, Backbone)
    torch.testing.assert_close(backbone(images), model(images, 1))

"""A small ResNet with grouped paths, and its arithmetic written out in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ladderstitch.scheduling.profiles import Quality, QualityTable
from ladderstitch.vision.bundle import (
    Preprocessing,
    VisionBundle,
    VisionManifest,
    write_bundle,
    write_table,
)
from ladderstitch.vision.models.snnet_staged import StagedConfig
from tests.vision.models.test_families import build_with_random_norms

BlockKind = Literal["BasicBlock", "Bottleneck"]
DEPTHS = (3, 2, 4, 1)
IMAGE_SHAPE = (1, 16, 16)
GROUPS: dict[str, tuple[tuple[tuple[int, int], ...], ...]] = {
    "pair": ((), (), ((2, 2),), ()),
    "wide": (((1, 2),), (), ((1, 3),), ()),
    "single": (((1, 1),), ((1, 1),), ((1, 1), (3, 1)), ()),
}
"""Groups of each stage, by the name of the path; those of `single` have one block each."""


def grouped_config(block: BlockKind = "BasicBlock", **changes: Any) -> StagedConfig:
    """Return a family of one anchor and its grouped paths."""
    fields: dict[str, Any] = {
        "inputs": {"image_size": 16, "in_channels": 1, "num_classes": 4},
        "anchors": [
            {"kind": "resnet", "block": block, "depths": DEPTHS, "width": 4, "stem": "small"}
        ],
        "stages": [],
        "grouped_paths": [
            {"name": name, "anchor": 0, "groups": groups} for name, groups in GROUPS.items()
        ],
    }
    return StagedConfig.model_validate(fields | changes)


def write_grouped_bundle(path: Path, config: StagedConfig) -> VisionBundle:
    """Return a bundle of random weights, and qualities that fall with the id."""
    inputs = config.inputs
    fields = {
        "channels": inputs.in_channels,
        "height": inputs.image_size,
        "width": inputs.image_size,
        "mean": [0.5] * inputs.in_channels,
        "std": [0.25] * inputs.in_channels,
    }
    manifest = VisionManifest(
        name="grouped",
        family=config.family,
        config=config,
        labels=tuple(f"label-{i}" for i in range(inputs.num_classes)),
        preprocessing=Preprocessing.model_validate(fields),
        origin="random weights",
        licence="Apache-2.0",
    )
    write_bundle(path, manifest, build_with_random_norms(config))
    values = {s.id: 0.9 - 0.1 * s.id for s in config.stitches()}
    table = QualityTable(
        metric="top-1 accuracy",
        data="fake",
        n=100,
        confidence=0.95,
        date="2026-01-01",
        versions={},
        variants={i: Quality(value=v, low=v, high=v) for i, v in values.items()},
    )
    write_table(path / "quality.json", table)
    return VisionBundle.load(path)


def bundle_logits(bundle: VisionBundle, images: Tensor, name: str | None) -> Tensor:
    """Return `reference_logits` with the weights in a bundle's file."""
    return reference_logits(load_file(bundle.path / "weights.safetensors"), images, name)


def reference_logits(tensors: Mapping[str, Tensor], images: Tensor, name: str | None) -> Tensor:
    """Return the logits [B, 4] in float64 of a grouped path, or of the anchor without a name.

    Written with functions of torch only. A group adds the branches of all its blocks to its input,
    and the ReLU follows the sum.
    """
    w = {key.removeprefix("anchors.0."): t.double() for key, t in tensors.items()}
    groups = GROUPS[name] if name is not None else ((),) * len(DEPTHS)
    x = F.relu(_conv_norm(w, "conv1", "bn1", images.double(), 1))
    for stage, depth in enumerate(DEPTHS):
        sizes, block = dict(groups[stage]), 0
        while block < depth:
            stride = 2 if stage and not block else 1
            members = range(block, block + sizes.get(block, 1))
            total = _shortcut(w, f"layer{stage + 1}.{block}", x, stride)
            for member in members:
                total = total + _branch(w, f"layer{stage + 1}.{member}", x, stride)
            x, block = F.relu(total), members[-1] + 1
    return F.linear(x.mean((2, 3)), w["fc.weight"], w["fc.bias"])


def _shortcut(w: Mapping[str, Tensor], block: str, x: Tensor, stride: int) -> Tensor:
    if f"{block}.downsample.0.weight" not in w:
        return x
    return _conv_norm(w, f"{block}.downsample.0", f"{block}.downsample.1", x, stride)


def _branch(w: Mapping[str, Tensor], block: str, x: Tensor, stride: int) -> Tensor:
    """Return the convolutions of a block, the first 3x3 one with the stride."""
    count = 3 if f"{block}.conv3.weight" in w else 2
    strided = 2 if count == 3 else 1
    for n in range(1, count + 1):
        x = _conv_norm(w, f"{block}.conv{n}", f"{block}.bn{n}", x, stride if n == strided else 1)
        x = F.relu(x) if n < count else x
    return x


def _conv_norm(w: Mapping[str, Tensor], conv: str, norm: str, x: Tensor, stride: int) -> Tensor:
    weight = w[f"{conv}.weight"]
    x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
    mean, var = (w[f"{norm}.running_{name}"] for name in ("mean", "var"))
    return F.batch_norm(x, mean, var, w[f"{norm}.weight"], w[f"{norm}.bias"], eps=1e-5)

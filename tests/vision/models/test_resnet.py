"""Tests of ResNet's stems; the golden cases check the large one."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from ladderstitch.vision.models.cost import stitch_cost
from ladderstitch.vision.models.resnet import ResNetConfig
from ladderstitch.vision.models.snnet_staged import StagedConfig
from ladderstitch.vision.models.stitched import StitchedModel
from ladderstitch.vision.models.vit import InputShape


def small_pair() -> StitchedModel:
    """Return two stitched anchors for images of 28 pixels per side."""
    torch.manual_seed(0)
    anchors = [
        ResNetConfig(block="BasicBlock", depths=(2, 2, 2, 2), width=width, stem="small")
        for width in (4, 8)
    ]
    config = StagedConfig(
        inputs=InputShape(image_size=28, in_channels=1, num_classes=10),
        anchors=tuple(anchors),
        stages=(0, 1, 2),
    )
    return config.build().eval().requires_grad_(False)


def test_small_stem_keeps_the_size_of_the_image() -> None:
    model = small_pair()
    x = model.backbones()[0].embed(torch.randn(2, 1, 28, 28))
    assert x.shape == (2, 4, 28, 28)
    sides = []
    for step in model.backbones()[0].steps():
        x = step(x)
        sides.append(x.shape[-1])
    assert sides == [28, 28, 14, 14, 7, 7, 4, 4]


def test_small_stem_costs_what_torch_counts() -> None:
    model = small_pair()
    model.fold_batch_norm()
    images = torch.randn(1, 1, 28, 28)
    assert len(model.stitches) == 5
    for stitch in model.stitches:
        with FlopCounterMode(display=False) as counter:
            model(images, stitch.id)
        counted = counter.get_total_flops() / 2
        assert abs(stitch_cost(model, stitch, 28).macs - counted) < 0.01 * counted

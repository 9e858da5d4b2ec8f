"""Tests of EfficientNet-Lite: TensorFlow's padding, folding, stitches after whole stages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ladderstitch.vision.models.cost import stitch_cost
from ladderstitch.vision.models.efficientnet import EfficientNetLiteConfig, SameConv
from ladderstitch.vision.models.executor import StitchExecutor
from ladderstitch.vision.models.route import Segment
from ladderstitch.vision.models.snnet_staged import StagedConfig
from ladderstitch.vision.models.vit import InputShape
from tests.vision.models.test_families import build_with_random_norms

LITE0 = EfficientNetLiteConfig(widths=(16, 24, 40, 80, 112, 192, 320), depths=(1, 2, 2, 3, 3, 4, 1))
LITE2 = EfficientNetLiteConfig(widths=(16, 24, 48, 88, 120, 208, 352), depths=(1, 3, 3, 4, 4, 5, 1))


def family(classes: int = 1000) -> StagedConfig:
    inputs = InputShape(image_size=224, num_classes=classes)
    return StagedConfig(inputs=inputs, anchors=(LITE0, LITE2), stages=(1, 4), joints="after")


@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 2, 8), (3, 2, 7), (5, 2, 8), (5, 1, 9)])
def test_same_conv_odd_padding_goes_right_and_below(kernel: int, stride: int, size: int) -> None:
    torch.manual_seed(0)
    layer = SameConv(2, 3, kernel, stride=stride, bias=False)
    x = torch.randn(1, 2, size, size)
    spare = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    before, after = spare // 2, spare - spare // 2
    expected = F.conv2d(F.pad(x, (before, after, before, after)), layer.weight, stride=stride)
    torch.testing.assert_close(layer(x), expected)
    assert layer(x).shape[-1] == -(-size // stride)


def test_published_parameter_and_mac_counts() -> None:
    with torch.device("meta"):
        model = family().build()
    counts = [round(sum(p.numel() for p in b.parameters()) / 1e6, 2) for b in model.backbones()]
    assert counts == [4.65, 6.09]
    lite0 = stitch_cost(model, model.stitches[0], 224)
    assert 0.38e9 < lite0.macs < 0.43e9  # published: 407 M at 224 pixels


def test_stitches_after_whole_stages_have_segments() -> None:
    stitches = family().stitches()
    assert [stitch.segments for stitch in stitches[2:]] == [
        (Segment(0, 0, 2), Segment(1, 4, 20)),
        (Segment(0, 0, 10), Segment(1, 15, 20)),
    ]
    assert stitches[3].layers == ("stitch_layers.1.0.0.transform",)


def test_fold_batch_norm_keeps_logits() -> None:
    small = family(classes=5)
    model = build_with_random_norms(small)
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        before = [model(images, stitch.id) for stitch in model.stitches]
        model.fold_batch_norm()
        serving = StitchExecutor(model)
        for stitch, expected in zip(model.stitches, before, strict=True):
            difference = (serving(images, stitch.id) - expected).abs().max()
            assert difference < 1e-4 * expected.abs().max().clamp(min=1)

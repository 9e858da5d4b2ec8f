"""Tests of the forward pass: shared weights, no state, executor; `verify` has golden outputs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ladderstitch.vision.models.executor import StitchExecutor
from ladderstitch.vision.models.vit import ConvStem, InputShape, Vit, VitConfig
from tests.conftest import tiny_config


def test_executor_equals_modules_on_every_stitch() -> None:
    torch.manual_seed(1)
    model = tiny_config().build().eval()
    serving, images = StitchExecutor(model), torch.randn(3, 1, 8, 8)
    with torch.inference_mode():
        for stitch in model.stitches:
            torch.testing.assert_close(serving(images, stitch.id), model(images, stitch.id))


def test_executor_batch_equals_single_images() -> None:
    torch.manual_seed(2)
    model = StitchExecutor(tiny_config().build().eval())
    images = torch.randn(5, 1, 8, 8)
    with torch.inference_mode():
        together = model(images, 4)
        alone = torch.cat([model(image[None], 4) for image in images])
    torch.testing.assert_close(together, alone)


def test_executor_concurrent_stitches_equal_sequential() -> None:
    torch.manual_seed(3)
    model = tiny_config().build().eval().requires_grad_(False)
    serving, images = StitchExecutor(model), torch.randn(2, 1, 8, 8)
    ids = [stitch.id for stitch in model.stitches] * 20
    expected = {stitch: serving(images, stitch) for stitch in set(ids)}
    with ThreadPoolExecutor(4) as pool:
        for stitch, got in zip(ids, pool.map(lambda s: serving(images, s), ids), strict=True):
            assert torch.equal(got, expected[stitch])


def test_executor_shares_every_weight() -> None:
    model = tiny_config().build()
    parameters = sum(p.numel() for p in model.parameters())
    parts = sum(p.numel() for backbone in model.backbones() for p in backbone.parameters())
    parts += sum(p.numel() for p in model.stitch_layers.parameters())
    assert parameters == parts
    before = {p.data_ptr() for p in model.parameters()}
    StitchExecutor(model.requires_grad_(False))
    assert {p.data_ptr() for p in model.parameters()} == before


def test_unknown_stitch_raises_key_error() -> None:
    with pytest.raises(KeyError):
        tiny_config().build()(torch.zeros(1, 1, 8, 8), 99)


def test_conv_stem_fold_batch_norm_keeps_logits() -> None:
    torch.manual_seed(4)
    config = VitConfig(
        embed_dim=8, depth=1, num_heads=2, stem=((4, 2), (6, 1), (8, 2)), stem_batch_norm=True
    )
    vit = Vit(InputShape(image_size=9, in_channels=1, num_classes=3), config)
    images = torch.randn(6, 1, 9, 9)
    vit.train()(images)  # changes the running statistics
    vit.eval()
    assert isinstance(vit.patch_embed, ConvStem)
    with torch.no_grad():
        before = vit(images)
        vit.patch_embed.fold_batch_norm()
        torch.testing.assert_close(vit(images), before)
    assert not any("running" in name for name in vit.state_dict())

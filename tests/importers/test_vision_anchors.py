"""Tests of anchors in Hugging Face's and timm's layout against the original implementations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import nn

from ladderstitch.errors import BundleError, DataError
from ladderstitch.importers.vision_anchors import anchor_from_tensors, load_anchor


def randomise(model: nn.Module, std: float = 0.1) -> nn.Module:
    """Set all parameters to random values, also those that are initialised to 0 or 1."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, std)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


def vit(kind: str) -> nn.Module:
    sizes = {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 96,
        "num_labels": 5,
    }
    if kind == "vit":
        return hf.ViTForImageClassification(hf.ViTConfig(**sizes))
    if kind == "deit":
        return hf.DeiTForImageClassification(hf.DeiTConfig(**sizes))
    return hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**sizes))


def swin() -> nn.Module:
    config = hf.SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[2, 2, 2],
        num_heads=[1, 2, 4],
        window_size=4,
        num_labels=5,
    )
    return hf.SwinForImageClassification(config)


def resnet(kind: str) -> nn.Module:
    expansion = 4 if kind == "bottleneck" else 1
    config = hf.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8 * expansion * 2**s for s in range(4)],
        depths=[2, 1, 2, 1],
        layer_type=kind,
        num_labels=5,
    )
    return hf.ResNetForImageClassification(config)


@pytest.mark.parametrize(
    ("name", "image"),
    [("vit", 32), ("deit", 32), ("distilled", 32), ("swin", 64), ("basic", 64), ("bottleneck", 64)],
)
def test_anchor_in_hugging_face_layout_gives_its_logits(
    tmp_path: Path, name: str, image: int
) -> None:
    if name in ("basic", "bottleneck"):
        model = resnet(name)
    else:
        model = swin() if name == "swin" else vit(name)
    randomise(model).save_pretrained(tmp_path)
    anchor = load_anchor(tmp_path / "model.safetensors")
    images = torch.randn(2, 3, image, image)
    with torch.inference_mode():
        expected = model(images).logits
        got = anchor.build()(images)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


REAL_SIZES = {
    "DeiT-S": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000
        )
    ),
    "DeiT-B": lambda: hf.ViTForImageClassification(hf.ViTConfig(num_labels=1000)),
    "DeiT-B distilled": lambda: hf.DeiTForImageClassificationWithTeacher(
        hf.DeiTConfig(num_labels=1000)
    ),
    "Swin-T": lambda: hf.SwinForImageClassification(hf.SwinConfig(num_labels=1000)),
    "ResNet-50": lambda: hf.ResNetForImageClassification(hf.ResNetConfig(num_labels=1000)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_SIZES)
def test_anchor_of_real_size_gives_its_logits(tmp_path: Path, name: str) -> None:
    model = randomise(REAL_SIZES[name](), std=0.03)
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        expected = model(images).logits
        got = load_anchor(tmp_path / "model.safetensors").build()(images)
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    print(f"{name}: {error:.1e}")  # noqa: T201
    assert error <= 1e-4


def test_anchor_in_timm_layout_needs_no_configuration(tmp_path: Path) -> None:
    """timm's names are ours, except for those of the newer Swin."""
    randomise(swin()).save_pretrained(tmp_path)
    anchor = load_anchor(tmp_path / "model.safetensors")
    moved = dict(anchor.tensors)
    for stage in (1, 0):
        for name in [k for k in moved if k.startswith(f"layers.{stage}.downsample.")]:
            moved[name.replace(f"layers.{stage}", f"layers.{stage + 1}")] = moved.pop(name)
    moved = {k.replace("head.", "head.fc."): v for k, v in moved.items()}
    (tmp_path / "timm").mkdir()
    save_file(moved, tmp_path / "timm" / "model.safetensors")
    again = load_anchor(tmp_path / "timm" / "model.safetensors", image_size=64)
    assert again.config == anchor.config
    assert again.inputs == anchor.inputs
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again.build()(images), anchor.build()(images))


def test_anchor_that_does_not_fit_raises_with_the_names(tmp_path: Path) -> None:
    randomise(vit("vit")).save_pretrained(tmp_path)
    anchor = load_anchor(tmp_path / "model.safetensors")
    tensors = dict(anchor.tensors)
    tensors["blocks.1.norm1.weight"] = torch.zeros(3)
    tensors["extra"] = tensors.pop("blocks.2.mlp.fc2.bias")
    with pytest.raises(
        BundleError, match=r"blocks.1.norm1.weight: expected \(48,\), got \(3,\)"
    ) as e:
        anchor_from_tensors(tensors, {"num_attention_heads": 3}).build()
    assert "missing blocks.2.mlp.fc2.bias" in str(e.value)
    assert "unknown extra" in str(e.value)
    with pytest.raises(DataError, match="expected a ViT or DeiT"):
        anchor_from_tensors({"weird": torch.zeros(1)}, {})
    del tensors["patch_embed.proj.weight"]
    with pytest.raises(DataError, match=r"expected the tensor 'patch_embed.proj.weight' of a vit"):
        anchor_from_tensors(tensors, {})
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 7}))
    with pytest.raises(Exception, match="num_heads: expected a divisor of embed_dim 48, got 7"):
        load_anchor(tmp_path / "model.safetensors")

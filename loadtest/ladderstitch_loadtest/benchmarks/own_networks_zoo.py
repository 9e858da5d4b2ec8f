"""Networks of published architectures with random weights, as their users would have them.

The classes are those of transformers, timm and torchvision. Sizes are small. Weights are drawn so
that every block changes its input and outputs are of the order of 1: initial values of many
libraries make residual branches, or the whole output, zero.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from ladderstitch_loadtest.servers.peer_packages import installed_packages

PACKAGES = ("timm==1.0.31", "torchvision==0.28.0")
"""Packages that are no dependencies of the project; they need nothing that it has not."""
MISSING_OPERATORS = ("nms", "qnms")
"""Operators that torchvision declares shapes for at its import, and that CPU builds of torch lack.

PyPI's build of torchvision needs CUDA. No network here uses them."""


@dataclass(frozen=True, slots=True)
class ZooNetwork:
    """One network: a class of transformers, a name of timm, or a function of this module.

    `fields` configure a class of transformers. `shape` is that of one input.
    """

    library: Literal["transformers", "timm", "function"]
    name: str
    shape: tuple[int, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Architecture:
    """Networks of one architecture, small and large; `block` matches the class names of blocks."""

    name: str
    block: str
    networks: tuple[ZooNetwork, ...]


def _transformers(
    name: str, shape: tuple[int, ...], *fields: Mapping[str, Any], **common: Any
) -> tuple[ZooNetwork, ...]:
    """Return one network of a class for each set of fields."""
    return tuple(ZooNetwork("transformers", name, shape, common | dict(own)) for own in fields)


def _timm(shape: tuple[int, ...], *names: str) -> tuple[ZooNetwork, ...]:
    return tuple(ZooNetwork("timm", name, shape) for name in names)


IMAGE = (3, 64, 64)
TOKENS: dict[str, Any] = {"num_attention_heads": 4, "image_size": 64, "patch_size": 8}
SMALL_TOKENS = {"hidden_size": 48, "num_hidden_layers": 3, "intermediate_size": 96}
LARGE_TOKENS = {"hidden_size": 96, "num_hidden_layers": 5, "intermediate_size": 192}
ARCHITECTURES = (
    Architecture(
        "ConvNeXt",
        "ConvNextLayer",
        _transformers(
            "ConvNextForImageClassification",
            IMAGE,
            {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]},
            {"hidden_sizes": [24, 40, 64, 96], "depths": [2, 2, 3, 2]},
            patch_size=4,
            num_labels=10,
        ),
    ),
    Architecture(
        "EfficientNet",
        "InvertedResidual|DepthwiseSeparableConv",
        _timm((3, 96, 96), "efficientnet_lite0", "efficientnet_lite2"),
    ),
    Architecture(
        "MobileNetV3",
        "InvertedResidual|DepthwiseSeparableConv",
        _timm((3, 96, 96), "mobilenetv3_small_050", "mobilenetv3_small_100"),
    ),
    Architecture("RegNet", "Bottleneck", _timm((3, 96, 96), "regnety_002", "regnety_004")),
    Architecture(
        "ViT",
        "Block",
        _timm((3, 96, 96), "vit_tiny_patch16_224", "vit_small_patch16_224"),
    ),
    Architecture(
        "DINOv2",
        "Dinov2Layer",
        _transformers(
            "Dinov2Model",
            (3, 70, 70),
            {"num_hidden_layers": 3},
            {"num_hidden_layers": 6},
            hidden_size=96,  # the width of the embedding, which networks of a family share
            num_attention_heads=4,
            image_size=98,
            patch_size=14,
        ),
    ),
    Architecture(
        "CLIP vision tower",
        "CLIPEncoderLayer",
        _transformers(
            "CLIPModel",
            IMAGE,
            {"vision_config": TOKENS | SMALL_TOKENS},
            {"vision_config": TOKENS | LARGE_TOKENS},
            text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
            projection_dim=32,
        ),
    ),
    Architecture(
        "BEiT",
        "BeitLayer",
        _transformers(
            "BeitForImageClassification",
            IMAGE,
            SMALL_TOKENS,
            LARGE_TOKENS,
            **TOKENS,
            num_labels=10,
        ),
    ),
    Architecture(
        "Swin",
        "SwinLayer",
        _transformers(
            "SwinForImageClassification",
            IMAGE,
            {"embed_dim": 16, "depths": [1, 2, 1]},
            {"embed_dim": 32, "depths": [2, 2, 2]},
            image_size=64,
            patch_size=2,
            window_size=4,
            num_heads=[2, 4, 8],
            num_labels=10,
        ),
    ),
    Architecture("ResNet", "BasicBlock|Bottleneck", _timm((3, 96, 96), "resnet10t", "resnet18")),
    Architecture(
        "Inception-ResNet",
        "Block35|Block17|Block8",
        _timm((3, 139, 139), "inception_resnet_v2"),
    ),
    Architecture(
        "SegFormer",
        "SegformerLayer",
        _transformers(
            "SegformerForSemanticSegmentation",
            IMAGE,
            {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
            {"hidden_sizes": [16, 32, 48, 64], "depths": [2, 2, 2, 2]},
            decoder_hidden_size=32,
            num_labels=7,
        ),
    ),
    Architecture(
        "3-D ResNet",
        "BasicBlock",
        tuple(ZooNetwork("function", name, (3, 8, 56, 56)) for name in ("r3d_10", "r3d_18")),
    ),
)


def add_packages() -> None:
    """Let this process import timm and torchvision, which are installed into the cache."""
    folder = str(installed_packages(PACKAGES))
    if folder in sys.path:
        return
    sys.path.append(folder)
    for name in MISSING_OPERATORS:
        torch.library.define(f"torchvision::{name}", "(Tensor boxes) -> Tensor")


def write_source(network: ZooNetwork, folder: Path) -> list[str]:
    """Write a network with random weights, and return source and options of `export`."""
    shape = ["--shape", ",".join(map(str, network.shape))]
    if network.library == "function":
        return [f"{__name__}:{network.name}", *shape]
    if network.library == "timm":
        timm = importlib.import_module("timm")
        arguments: dict[str, Any] = {}
        if timm.get_pretrained_cfg(network.name).fixed_input_size:
            arguments["img_size"] = network.shape[1:]
        module = _draw_weights(timm.create_model(network.name, **arguments))
        save_file(module.state_dict(), folder / "weights.safetensors")
        return [f"timm:{network.name}", "--checkpoint", str(folder / "weights.safetensors"), *shape]
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    kind = getattr(transformers, network.name)
    module = _draw_weights(kind(kind.config_class(**network.fields)))
    module.save_pretrained(folder)  # type: ignore[operator]
    return [str(folder), *shape]


def r3d_10() -> nn.Module:
    """Return a 3-D ResNet of torchvision with one block in each of its four stages."""
    video = importlib.import_module("torchvision.models.video.resnet")
    makers = [video.Conv3DSimple] * 4
    network: nn.Module = video.VideoResNet(
        video.BasicBlock, makers, [1, 1, 1, 1], video.BasicStem, num_classes=10
    )
    return _draw_weights(network)


def r3d_18() -> nn.Module:
    """Return torchvision's R3D-18."""
    video = importlib.import_module("torchvision.models.video")
    return _draw_weights(video.r3d_18(num_classes=10))


def _draw_weights(network: nn.Module) -> nn.Module:
    """Return a network with weights drawn from a fixed seed, ready for inference.

    Products keep the size of inputs after a rectifier. Scales are 0.5 to 1.5, biases and shifts
    about 0.1.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in network.state_dict(keep_vars=True).items():
            if not tensor.is_floating_point():
                continue
            shifts = name.endswith(("bias", "running_mean"))
            if tensor.ndim == 1 and not shifts:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.ndim < 2:
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
            else:
                scale = math.sqrt(2 / max(1, tensor[0].numel())) if len(tensor) > 1 else 1.0
                tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
    return network.eval()

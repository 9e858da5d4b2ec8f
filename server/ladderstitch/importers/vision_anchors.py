"""Pretrained networks as anchors: DeiT, ViT, Swin and ResNet under timm's or Hugging Face's names.

Shapes say nearly all about a network; what they do not (heads, epsilons, the image size) comes
from the `config.json` of a Hugging Face checkpoint, or from the family's custom.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ladderstitch.bundles import check_tensors, shapes_of
from ladderstitch.errors import ConfigError, DataError
from ladderstitch.importers.checkpoints import read_weights
from ladderstitch.importers.stitched_families import COMPUTED
from ladderstitch.vision.models.resnet import ResNetConfig
from ladderstitch.vision.models.stitched import Backbone
from ladderstitch.vision.models.swin import SwinConfig
from ladderstitch.vision.models.vit import InputShape, VitConfig

Tensors = dict[str, Tensor]
PlainConfig = VitConfig | SwinConfig | ResNetConfig

ENCODER_LAYER = (
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.output\.dense", "attn.proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
    (r"attention\.attention\.", "attn."),
    (r"attention\.self\.", "attn."),
)
RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "vit": (
        (r"^(vit|deit)\.embeddings\.cls_token", "cls_token"),
        (r"^(vit|deit)\.embeddings\.distillation_token", "dist_token"),
        (r"^(vit|deit)\.embeddings\.position_embeddings", "pos_embed"),
        (r"^(vit|deit)\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"^(vit|deit)\.encoder\.layer\.", "blocks."),
        (r"^(vit|deit)\.layernorm", "norm"),
        (r"^(cls_)?classifier", "head"),
        (r"^distillation_classifier", "head_dist"),
        *ENCODER_LAYER,
    ),
    "swin": (
        (r"^swin\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"^swin\.embeddings\.norm", "patch_embed.norm"),
        (r"^swin\.encoder\.layers\.", "layers."),
        (r"^swin\.layernorm", "norm"),
        (r"^classifier", "head"),
        (r"^head\.fc", "head"),
        *ENCODER_LAYER,
    ),
    "resnet": (
        (r"^resnet\.embedder\.embedder\.convolution", "conv1"),
        (r"^resnet\.embedder\.embedder\.normalization", "bn1"),
        (r"shortcut\.convolution", "downsample.0"),
        (r"shortcut\.normalization", "downsample.1"),
        (r"^classifier\.1", "fc"),
    ),
}
"""Hugging Face's names (and newer timm's) to those that our anchors share with upstream."""


@dataclass(frozen=True, slots=True)
class PlainAnchor:
    """A network's shape and its weights, under our names."""

    inputs: InputShape
    config: PlainConfig
    tensors: Tensors

    def build(self) -> Backbone:
        """The network, in eval mode; raises `BundleError` naming the tensors that do not fit."""
        trunk = self.config.build(self.inputs)
        check_tensors(
            shapes_of(trunk.state_dict()), shapes_of(self.tensors), where=type(trunk).__name__
        )
        trunk.load_state_dict(self.tensors)
        return trunk.eval().requires_grad_(False)


def load_anchor(
    path: Path,
    config: Path | None = None,
    *,
    image_size: int | None = None,
    num_heads: int | None = None,
) -> PlainAnchor:
    """A checkpoint file, with `config` or the `config.json` beside it where there is one.

    Raises `DataError` or `ConfigError` naming what is missing.
    """
    config = config or path.with_name("config.json")
    try:
        stated = json.loads(config.read_text()) if config.exists() else {}
    except json.JSONDecodeError as error:
        raise ConfigError(f"{config}: {error}") from error
    given = {"image_size": image_size, "num_attention_heads": num_heads}
    return plain_anchor(read_weights(path), stated | {k: v for k, v in given.items() if v})


def plain_anchor(tensors: Mapping[str, Tensor], stated: Mapping[str, Any]) -> PlainAnchor:
    """Tensors under timm's or Hugging Face's names; `stated` has Hugging Face's fields."""
    kind = _kind(tensors)
    renamed = _fuse_qkv({_rename(name, kind): tensor for name, tensor in tensors.items()})
    kept = {k: v for k, v in renamed.items() if not k.endswith(COMPUTED)}
    try:
        inputs, config = READERS[kind](kept, stated)
    except KeyError as error:
        raise DataError(f"checkpoint: expected the tensor {error} of a {kind}") from error
    except ValidationError as error:
        raise ConfigError(f"{kind}: {error}") from error
    return PlainAnchor(inputs, config, _complete(kept, config))


def _kind(tensors: Mapping[str, Tensor]) -> str:
    for kind, sign in (
        ("swin", "relative_position_bias_table"),
        ("resnet", "layer1.0.conv1.weight"),
        ("resnet", "resnet.embedder"),
        ("vit", "cls_token"),
    ):
        if any(sign in name for name in tensors):
            return kind
    raise DataError(
        "checkpoint: expected a ViT or DeiT (cls_token), a Swin (relative_position_bias_table) or "
        f"a ResNet (layer1.0.conv1), got {sorted(tensors)[:3]}"
    )


def _rename(name: str, kind: str) -> str:
    for pattern, ours in RENAMES[kind]:
        name = re.sub(pattern, ours, name)
    if found := re.match(r"resnet\.encoder\.stages\.(\d)\.layers\.(\d+)\.(.*)", name):
        stage, block, rest = int(found[1]) + 1, found[2], found[3]  # ours count from 1
        if inner := re.match(r"layer\.(\d)\.(convolution|normalization)\.(.*)", rest):
            part = "conv" if inner[2] == "convolution" else "bn"
            rest = f"{part}{int(inner[1]) + 1}.{inner[3]}"
        return f"layer{stage}.{block}.{rest}"
    return name


def _fuse_qkv(tensors: Tensors) -> Tensors:
    """Queries, keys and values as one matrix, as timm keeps them."""
    fused = dict(tensors)
    for name in tensors:
        if found := re.fullmatch(r"(.*attn\.)query\.(weight|bias)", name):
            parts = [
                fused.pop(f"{found[1]}{part}.{found[2]}") for part in ("query", "key", "value")
            ]
            fused[f"{found[1]}qkv.{found[2]}"] = torch.cat(parts)
    return fused


def _complete(tensors: Tensors, config: PlainConfig) -> Tensors:
    """Batch counters, which exported checkpoints may lack and nothing reads."""
    if not isinstance(config, ResNetConfig):
        return tensors
    counters = {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(0)
        for name in tensors
        if name.endswith("running_mean")
    }
    return counters | tensors


def _count(tensors: Tensors, pattern: str) -> int:
    """One more than the largest number that the pattern captures."""
    numbers = [int(found[1]) for name in tensors if (found := re.match(pattern, name))]
    return max(numbers, default=-1) + 1


def _vit(tensors: Tensors, stated: Mapping[str, Any]) -> tuple[InputShape, VitConfig]:
    patches, positions = tensors["patch_embed.proj.weight"], tensors["pos_embed"]
    width, channels, patch, _ = patches.shape
    first = 2 if "dist_token" in tensors else 1
    distillation = "heads" if "head_dist.weight" in tensors else "token" if first == 2 else "none"
    side = math.isqrt(positions.shape[1] - first)
    config = VitConfig(
        embed_dim=width,
        depth=_count(tensors, r"blocks\.(\d+)\."),
        num_heads=stated.get("num_attention_heads", max(1, width // 64)),
        mlp_ratio=tensors["blocks.0.mlp.fc1.weight"].shape[0] / width,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        layer_norm_eps=stated.get("layer_norm_eps", 1e-6),
        patch_size=patch,
        distillation=distillation,
    )
    return _inputs(side * patch, channels, tensors["head.weight"]), config


def _swin(tensors: Tensors, stated: Mapping[str, Any]) -> tuple[InputShape, SwinConfig]:
    width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    stages = _count(tensors, r"layers\.(\d+)\.")
    tables = [
        tensors[f"layers.{stage}.blocks.0.attn.relative_position_bias_table"]
        for stage in range(stages)
    ]
    config = SwinConfig(
        embed_dim=width,
        depths=tuple(_count(tensors, rf"layers\.{s}\.blocks\.(\d+)\.") for s in range(stages)),
        num_heads=tuple(table.shape[1] for table in tables),
        window_size=stated.get("window_size", (math.isqrt(tables[0].shape[0]) + 1) // 2),
        patch_size=patch,
        mlp_ratio=tensors["layers.0.blocks.0.mlp.fc1.weight"].shape[0] / width,
        qkv_bias="layers.0.blocks.0.attn.qkv.bias" in tensors,
        layer_norm_eps=stated.get("layer_norm_eps", 1e-5),
    )
    _downsample_last(tensors, stages)
    return _inputs(stated.get("image_size", 224), channels, tensors["head.weight"]), config


def _downsample_last(tensors: Tensors, stages: int) -> None:
    """Newer timm puts a stage's downsampling before it, we after the stage before; in place."""
    if f"layers.{stages - 1}.downsample.reduction.weight" not in tensors:
        return
    for stage in range(1, stages):
        for part in ("norm.weight", "norm.bias", "reduction.weight"):
            moved = tensors.pop(f"layers.{stage}.downsample.{part}")
            tensors[f"layers.{stage - 1}.downsample.{part}"] = moved


def _resnet(tensors: Tensors, stated: Mapping[str, Any]) -> tuple[InputShape, ResNetConfig]:
    width, channels, _, _ = tensors["conv1.weight"].shape
    config = ResNetConfig(
        block="Bottleneck" if "layer1.0.conv3.weight" in tensors else "BasicBlock",
        depths=tuple(_count(tensors, rf"layer{stage}\.(\d+)\.") for stage in range(1, 5)),
        width=width,
    )
    return _inputs(stated.get("image_size", 224), channels, tensors["fc.weight"]), config


READERS: dict[str, Callable[[Tensors, Mapping[str, Any]], tuple[InputShape, PlainConfig]]] = {
    "vit": _vit,
    "swin": _swin,
    "resnet": _resnet,
}


def _inputs(image_size: int, channels: int, head: Tensor) -> InputShape:
    return InputShape(image_size=image_size, in_channels=channels, num_classes=head.shape[0])

"""Import of pretrained anchors: DeiT, ViT, Swin and ResNet in timm's or Hugging Face's layout.

The shapes of the tensors determine nearly all of a configuration. The rest (heads, epsilons, image
size) comes from the `config.json` of a Hugging Face checkpoint, or is the family's usual value.
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
AnchorConfig = VitConfig | SwinConfig | ResNetConfig

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
"""Patterns of Hugging Face's (and newer timm's) names -> the names that our anchors use."""


@dataclass(frozen=True, slots=True)
class PretrainedAnchor:
    """A network's configuration, and its tensors under our names."""

    inputs: InputShape
    config: AnchorConfig
    tensors: Tensors

    def build(self) -> Backbone:
        """Return the network in eval mode; raises `BundleError` naming tensors that do not fit."""
        backbone = self.config.build(self.inputs)
        check_tensors(
            shapes_of(backbone.state_dict()), shapes_of(self.tensors), where=type(backbone).__name__
        )
        backbone.load_state_dict(self.tensors)
        return backbone.eval().requires_grad_(False)


def load_anchor(
    path: Path,
    config: Path | None = None,
    *,
    image_size: int | None = None,
    num_heads: int | None = None,
) -> PretrainedAnchor:
    """Return the anchor in a checkpoint file.

    `config` defaults to the `config.json` in the same folder, if it exists; `image_size` and
    `num_heads` override it. Raises `DataError` or `ConfigError` naming what is missing.
    """
    config = config or path.with_name("config.json")
    try:
        stated = json.loads(config.read_text()) if config.exists() else {}
    except json.JSONDecodeError as error:
        raise ConfigError(f"{config}: {error}") from error
    given = {"image_size": image_size, "num_attention_heads": num_heads}
    return anchor_from_tensors(read_weights(path), stated | {k: v for k, v in given.items() if v})


def anchor_from_tensors(
    tensors: Mapping[str, Tensor], stated: Mapping[str, Any]
) -> PretrainedAnchor:
    """Return the anchor with these tensors, which have timm's or Hugging Face's names.

    `stated` has the fields of Hugging Face's `config.json` that are known. Raises `DataError` or
    `ConfigError` naming what is missing.
    """
    kind = _detect_kind(tensors)
    renamed = _fuse_qkv({_rename(name, kind): tensor for name, tensor in tensors.items()})
    kept = {k: v for k, v in renamed.items() if not k.endswith(COMPUTED)}
    try:
        inputs, config = READERS[kind](kept, stated)
    except KeyError as error:
        raise DataError(f"checkpoint: expected the tensor {error} of a {kind}") from error
    except ValidationError as error:
        raise ConfigError(f"{kind}: {error}") from error
    return PretrainedAnchor(inputs, config, _add_batch_counters(kept, config))


def _detect_kind(tensors: Mapping[str, Tensor]) -> str:
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
    """Return the tensors with queries, keys and values fused into one matrix, as in timm."""
    fused = dict(tensors)
    for name in tensors:
        if found := re.fullmatch(r"(.*attn\.)query\.(weight|bias)", name):
            parts = [
                fused.pop(f"{found[1]}{part}.{found[2]}") for part in ("query", "key", "value")
            ]
            fused[f"{found[1]}qkv.{found[2]}"] = torch.cat(parts)
    return fused


def _add_batch_counters(tensors: Tensors, config: AnchorConfig) -> Tensors:
    """Return the tensors with batch counters, which some checkpoints lack and no code reads."""
    if not isinstance(config, ResNetConfig):
        return tensors
    counters = {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(0)
        for name in tensors
        if name.endswith("running_mean")
    }
    return counters | tensors


def _count(tensors: Tensors, pattern: str) -> int:
    """Return 1 + the largest number that the pattern captures in a name."""
    numbers = [int(found[1]) for name in tensors if (found := re.match(pattern, name))]
    return max(numbers, default=-1) + 1


def _read_vit(tensors: Tensors, stated: Mapping[str, Any]) -> tuple[InputShape, VitConfig]:
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
    return _input_shape(side * patch, channels, tensors["head.weight"]), config


def _read_swin(tensors: Tensors, stated: Mapping[str, Any]) -> tuple[InputShape, SwinConfig]:
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
    _move_downsampling(tensors, stages)
    return _input_shape(stated.get("image_size", 224), channels, tensors["head.weight"]), config


def _move_downsampling(tensors: Tensors, stages: int) -> None:
    """Move each downsampling layer to the end of the previous stage, in place.

    Newer timm has it at the beginning of the next stage.
    """
    if f"layers.{stages - 1}.downsample.reduction.weight" not in tensors:
        return
    for stage in range(1, stages):
        for part in ("norm.weight", "norm.bias", "reduction.weight"):
            moved = tensors.pop(f"layers.{stage}.downsample.{part}")
            tensors[f"layers.{stage - 1}.downsample.{part}"] = moved


def _read_resnet(tensors: Tensors, stated: Mapping[str, Any]) -> tuple[InputShape, ResNetConfig]:
    width, channels, _, _ = tensors["conv1.weight"].shape
    config = ResNetConfig(
        block="Bottleneck" if "layer1.0.conv3.weight" in tensors else "BasicBlock",
        depths=tuple(_count(tensors, rf"layer{stage}\.(\d+)\.") for stage in range(1, 5)),
        width=width,
    )
    return _input_shape(stated.get("image_size", 224), channels, tensors["fc.weight"]), config


READERS: dict[str, Callable[[Tensors, Mapping[str, Any]], tuple[InputShape, AnchorConfig]]] = {
    "vit": _read_vit,
    "swin": _read_swin,
    "resnet": _read_resnet,
}


def _input_shape(image_size: int, channels: int, head: Tensor) -> InputShape:
    return InputShape(image_size=image_size, in_channels=channels, num_classes=head.shape[0])

"""What a stitch costs on paper: multiply-accumulates for one image, and the parameters it uses.

Counted as the published tables count (fvcore): a norm as 5 operations an element, batch
normalisation in eval mode as 2, pooling of maps as 1, nothing for activations, softmax, additions
and means over tokens. Parameters are all that the stitch runs through (upstream's own count leaves
out the front anchor's class token, positions and downsamplings).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ladderstitch.vision.models.efficientnet import EfficientNetLite, InvertedResidual
from ladderstitch.vision.models.levit import (
    ConvNorm,
    Levit,
    LevitAttention,
    LinearNorm,
    NormLinear,
    ResidualBlock,
)
from ladderstitch.vision.models.resnet import BasicBlock, Bottleneck, ResNet
from ladderstitch.vision.models.route import Stitch
from ladderstitch.vision.models.stitched import (
    Backbone,
    MapStitchingLayer,
    StitchedModel,
    StitchingLayer,
)
from ladderstitch.vision.models.swin import PatchMerging, Swin, SwinBlock
from ladderstitch.vision.models.vit import Block, ConvStem, PatchStem, Vit

LAYER_NORM, BATCH_NORM, POOLING = 5, 2, 1


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one stitch."""

    macs: int
    parameters: int


def stitch_cost(model: StitchedModel, stitch: Stitch, image_size: int) -> Cost:
    """Multiply-accumulates for one image of this size, and parameters of everything that runs."""
    trunks = model.trunks()
    front, end = trunks[stitch.front], trunks[stitch.end]
    macs, size = _embedding(front, image_size)
    used: list[nn.Module] = []
    for segment, layer in zip(stitch.segments, (*stitch.layers, None), strict=True):
        used.extend(list(trunks[segment.anchor].steps())[segment.first : segment.last + 1])
        if layer is not None:
            used.append(model.get_submodule(layer.removesuffix(".transform")))
    for step in used:
        added, size = _step(step, size)
        macs += added
    macs += _classifier(end, size, final_norm=stitch.final_norm)
    parameters = sum(p.numel() for module in used for p in module.parameters())
    parameters += _embedding_parameters(front) + _classifier_parameters(end)
    return Cost(macs, parameters)


def _embedding(trunk: Backbone, image_size: int) -> tuple[int, int]:
    """MACs, and the tokens (or the side of the map) that enter step 0."""
    match trunk:
        case Vit(patch_embed=PatchStem() as stem):
            side = stem.grid(image_size)
            return _conv(stem.proj, side), side**2 + 1
        case Vit(patch_embed=ConvStem() as stem):
            return _conv_stem(stem, image_size)
        case Swin():
            side = image_size // trunk.patch_embed.proj.stride[0]
            norm = LAYER_NORM * side**2 * trunk.patch_embed.norm.normalized_shape[0]
            return _conv(trunk.patch_embed.proj, side) + norm, side**2
        case ResNet():
            side = -(-image_size // 2)
            return _conv(trunk.conv1, side, trunk.bn1), -(-side // 2)
        case EfficientNetLite():
            side = -(-image_size // 2)
            return _conv(trunk._conv_stem, side, trunk._bn0), side
        case Levit():
            macs, side = 0, image_size
            for layer in trunk.patch_embed:
                if isinstance(layer, ConvNorm):
                    side = -(-side // 2)
                    macs += _conv(layer.c, side, layer.bn)
            return macs, side**2
    raise TypeError(f"no count for {type(trunk).__name__}")


def _conv_stem(stem: ConvStem, side: int) -> tuple[int, int]:
    macs = 0
    for conv, norm in zip(stem.convs, stem.norms, strict=True):
        assert isinstance(conv, nn.Conv2d)
        side = -(-side // conv.stride[0])
        macs += _conv(conv, side, norm)
    return macs, side**2 + 1


def _step(step: nn.Module, size: int) -> tuple[int, int]:
    """MACs of a step, and the tokens (or the side of the map) that leave it."""
    for kind, count in COUNTS.items():
        if isinstance(step, kind):
            found: tuple[int, int] = count(step, size)
            return found
    raise TypeError(f"no count for {type(step).__name__}")


def _conv(conv: nn.Conv2d, side: int, norm: nn.Module | None = None) -> int:
    """A convolution whose output is side x side."""
    macs = side**2 * conv.weight.numel()
    if isinstance(norm, nn.BatchNorm2d):
        macs += BATCH_NORM * side**2 * conv.out_channels
    return macs


def _linear(linear: nn.Linear, tokens: int) -> int:
    return tokens * linear.weight.numel()


def _linear_norm(layer: LinearNorm, tokens: int) -> int:
    norm = 0 if isinstance(layer.bn, nn.Identity) else BATCH_NORM * tokens * layer.c.out_features
    return _linear(layer.c, tokens) + norm


def _vit_block(block: Block, tokens: int) -> tuple[int, int]:
    width = block.attn.proj.in_features
    linears = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    macs = sum(_linear(linear, tokens) for linear in linears)
    return macs + 2 * tokens**2 * width + 2 * LAYER_NORM * tokens * width, tokens


def _swin_block(block: SwinBlock, tokens: int) -> tuple[int, int]:
    width = block.attn.proj.in_features
    linears = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    macs = sum(_linear(linear, tokens) for linear in linears)
    scores = 2 * tokens * block.window**2 * width
    return macs + scores + 2 * LAYER_NORM * tokens * width, tokens


def _merging(step: PatchMerging, tokens: int) -> tuple[int, int]:
    fewer = tokens // 4
    norm = LAYER_NORM * fewer * step.reduction.in_features
    return _linear(step.reduction, fewer) + norm, fewer


def _residual_block(block: BasicBlock | Bottleneck, side: int) -> tuple[int, int]:
    shortcut = None if block.downsample is None else block.downsample[0]
    assert shortcut is None or isinstance(shortcut, nn.Conv2d)
    after = side if shortcut is None else -(-side // shortcut.stride[0])
    convs: list[tuple[nn.Conv2d, nn.Module, int]] = []
    if isinstance(block, Bottleneck):
        convs.append((block.conv1, block.bn1, side))
        convs.append((block.conv2, block.bn2, after))
        convs.append((block.conv3, block.bn3, after))
    else:
        convs.append((block.conv1, block.bn1, after))
        convs.append((block.conv2, block.bn2, after))
    if shortcut is not None and block.downsample is not None:
        convs.append((shortcut, block.downsample[1], after))
    return sum(_conv(conv, at, norm) for conv, norm, at in convs), after


def _inverted_residual(block: InvertedResidual, side: int) -> tuple[int, int]:
    after = -(-side // block._depthwise_conv.stride[0])
    macs = _conv(block._expand_conv, side, block._bn0) if block.expands else 0
    macs += _conv(block._depthwise_conv, after, block._bn1)
    return macs + _conv(block._project_conv, after, block._bn2), after


def _levit_attention(step: LevitAttention, tokens: int) -> tuple[int, int]:
    fewer = step.index.shape[0]
    scores = fewer * tokens * step.num_heads * (step.key_dim + step.value_dim)
    projection = step.proj[1]
    assert isinstance(projection, LinearNorm)
    macs = scores + _linear_norm(projection, fewer)
    if hasattr(step, "qkv"):
        return macs + _linear_norm(step.qkv, tokens), fewer
    queries = step.q[1]
    assert isinstance(queries, LinearNorm)
    return macs + _linear_norm(step.kv, tokens) + _linear_norm(queries, fewer), fewer


def _residual(step: ResidualBlock, tokens: int) -> tuple[int, int]:
    if isinstance(step.m, LevitAttention):
        return _levit_attention(step.m, tokens)
    layers = [layer for layer in step.m.modules() if isinstance(layer, LinearNorm)]
    return sum(_linear_norm(layer, tokens) for layer in layers), tokens


def _map_stitch(step: MapStitchingLayer, side: int) -> tuple[int, int]:
    return _conv(step.transform, side), side**2 if step.to_tokens else side


COUNTS: dict[type[nn.Module], Callable[[Any, int], tuple[int, int]]] = {
    Block: _vit_block,
    SwinBlock: _swin_block,
    PatchMerging: _merging,
    BasicBlock: _residual_block,
    Bottleneck: _residual_block,
    InvertedResidual: _inverted_residual,
    ResidualBlock: _residual,
    LevitAttention: _levit_attention,
    StitchingLayer: lambda step, tokens: (_linear(step.transform, tokens), tokens),
    MapStitchingLayer: _map_stitch,
    nn.Identity: lambda step, size: (0, size),
}


def _classifier(trunk: Backbone, size: int, *, final_norm: bool) -> int:
    match trunk:
        case Vit():
            norm = LAYER_NORM * size * trunk.norm.normalized_shape[0] if final_norm else 0
            return norm + _linear(trunk.head, 1)
        case Swin():
            norm = LAYER_NORM * size * trunk.head.in_features if final_norm else 0
            return norm + _linear(trunk.head, 1)
        case ResNet():
            return POOLING * size**2 * trunk.fc.in_features + _linear(trunk.fc, 1)
        case EfficientNetLite():
            head = _conv(trunk._conv_head, size, trunk._bn1)
            pooled = POOLING * size**2 * trunk._fc.in_features
            return head + pooled + _linear(trunk._fc, 1)
        case Levit():
            heads = [head for head in trunk.children() if isinstance(head, NormLinear)]
            return sum(_linear(h.l, 1) + BATCH_NORM * h.l.in_features for h in heads)
    raise TypeError(f"no count for {type(trunk).__name__}")


def _embedding_parameters(trunk: Backbone) -> int:
    return (
        sum(p.numel() for p in trunk.parameters())
        - sum(p.numel() for step in trunk.steps() for p in step.parameters())
        - _classifier_parameters(trunk)
    )


def _classifier_parameters(trunk: Backbone) -> int:
    names = ("norm", "head", "fc", "head_dist", "_conv_head", "_bn1", "_fc")
    return sum(
        p.numel()
        for name, part in trunk.named_children()
        if name in names
        for p in part.parameters()
    )

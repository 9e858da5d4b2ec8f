"""Arithmetic cost of a stitch: multiply-accumulates (MACs) per image, and parameters in use.

MACs are counted like in the published tables (fvcore): per element, a layer norm counts 5, batch
normalisation in eval mode 2, and pooling of maps 1. Activations, softmax, additions and means over
tokens count nothing. Parameters are those of every module that the stitch runs. Upstream's own
count omits the front anchor's class token, positions and downsamplings.

`size` below is the number of tokens, or the side of the map for convolutional anchors.
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
"""Operations per element, counted as MACs."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Multiply-accumulates per image, and parameters, of one stitch."""

    macs: int
    parameters: int


def stitch_cost(model: StitchedModel, stitch: Stitch, image_size: int) -> Cost:
    """Return the cost of a stitch for one image of `image_size` x `image_size` pixels.

    Raises `TypeError` for a kind of anchor or step that has no counting rule.
    """
    backbones = model.backbones()
    front, end = backbones[stitch.front], backbones[stitch.end]
    macs, size = _embedding_macs(front, image_size)
    used: list[nn.Module] = []
    for segment, layer in zip(stitch.segments, (*stitch.layers, None), strict=True):
        used.extend(list(backbones[segment.anchor].steps())[segment.first : segment.last + 1])
        if layer is not None:
            used.append(model.get_submodule(layer.removesuffix(".transform")))
    for step in used:
        added, size = _step_macs(step, size)
        macs += added
    macs += _classifier_macs(end, size, final_norm=stitch.final_norm)
    parameters = sum(p.numel() for module in used for p in module.parameters())
    parameters += _embedding_parameters(front) + _classifier_parameters(end)
    return Cost(macs, parameters)


def _embedding_macs(backbone: Backbone, image_size: int) -> tuple[int, int]:
    """Return the embedding's MACs, and the size of the input of step 0."""
    match backbone:
        case Vit(patch_embed=PatchStem() as stem):
            side = stem.grid(image_size)
            return _conv_macs(stem.proj, side), side**2 + 1
        case Vit(patch_embed=ConvStem() as stem):
            return _conv_stem_macs(stem, image_size)
        case Swin():
            side = image_size // backbone.patch_embed.proj.stride[0]
            norm = LAYER_NORM * side**2 * backbone.patch_embed.norm.normalized_shape[0]
            return _conv_macs(backbone.patch_embed.proj, side) + norm, side**2
        case ResNet():
            side = -(-image_size // backbone.conv1.stride[0])
            macs = _conv_macs(backbone.conv1, side, backbone.bn1)
            return macs, -(-side // 2) if backbone.pools else side
        case EfficientNetLite():
            side = -(-image_size // 2)
            return _conv_macs(backbone._conv_stem, side, backbone._bn0), side
        case Levit():
            macs, side = 0, image_size
            for layer in backbone.patch_embed:
                if isinstance(layer, ConvNorm):
                    side = -(-side // 2)
                    macs += _conv_macs(layer.c, side, layer.bn)
            return macs, side**2
    raise TypeError(f"anchor: expected a kind with a counting rule, got {type(backbone).__name__}")


def _conv_stem_macs(stem: ConvStem, side: int) -> tuple[int, int]:
    """Return a convolutional stem's MACs for an image side, and the number of tokens after it."""
    macs = 0
    for conv, norm in zip(stem.convs, stem.norms, strict=True):
        assert isinstance(conv, nn.Conv2d)
        side = -(-side // conv.stride[0])
        macs += _conv_macs(conv, side, norm)
    return macs, side**2 + 1


def _step_macs(step: nn.Module, size: int) -> tuple[int, int]:
    """Return a step's MACs, and the size of its output."""
    for kind, count in STEP_MACS.items():
        if isinstance(step, kind):
            counted: tuple[int, int] = count(step, size)
            return counted
    raise TypeError(f"step: expected a kind with a counting rule, got {type(step).__name__}")


def _conv_macs(conv: nn.Conv2d, side: int, norm: nn.Module | None = None) -> int:
    """Return the MACs of a convolution with an output of side x side, and of the norm after it."""
    macs = side**2 * conv.weight.numel()
    if isinstance(norm, nn.BatchNorm2d):
        macs += BATCH_NORM * side**2 * conv.out_channels
    return macs


def _linear_macs(linear: nn.Linear, tokens: int) -> int:
    """Return the MACs of a linear map."""
    return tokens * linear.weight.numel()


def _linear_norm_macs(layer: LinearNorm, tokens: int) -> int:
    """Return the MACs of a linear map and its batch norm, unless the norm is folded."""
    norm = 0 if isinstance(layer.bn, nn.Identity) else BATCH_NORM * tokens * layer.c.out_features
    return _linear_macs(layer.c, tokens) + norm


def _vit_block_macs(block: Block, tokens: int) -> tuple[int, int]:
    """Return a ViT block's MACs and output size."""
    width = block.attn.proj.in_features
    linears = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    macs = sum(_linear_macs(linear, tokens) for linear in linears)
    return macs + 2 * tokens**2 * width + 2 * LAYER_NORM * tokens * width, tokens


def _swin_block_macs(block: SwinBlock, tokens: int) -> tuple[int, int]:
    """Return a Swin block's MACs and output size."""
    width = block.attn.proj.in_features
    linears = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    macs = sum(_linear_macs(linear, tokens) for linear in linears)
    scores = 2 * tokens * block.window**2 * width
    return macs + scores + 2 * LAYER_NORM * tokens * width, tokens


def _merging_macs(step: PatchMerging, tokens: int) -> tuple[int, int]:
    """Return a patch merging's MACs and output size."""
    fewer = tokens // 4
    norm = LAYER_NORM * fewer * step.reduction.in_features
    return _linear_macs(step.reduction, fewer) + norm, fewer


def _resnet_block_macs(block: BasicBlock | Bottleneck, side: int) -> tuple[int, int]:
    """Return a ResNet block's MACs and output size."""
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
    return sum(_conv_macs(conv, output, norm) for conv, norm, output in convs), after


def _inverted_residual_macs(block: InvertedResidual, side: int) -> tuple[int, int]:
    """Return an EfficientNet block's MACs and output size."""
    after = -(-side // block._depthwise_conv.stride[0])
    macs = _conv_macs(block._expand_conv, side, block._bn0) if block.expands else 0
    macs += _conv_macs(block._depthwise_conv, after, block._bn1)
    return macs + _conv_macs(block._project_conv, after, block._bn2), after


def _levit_attention_macs(step: LevitAttention, tokens: int) -> tuple[int, int]:
    """Return a LeViT attention's MACs and output size."""
    fewer = step.index.shape[0]
    scores = fewer * tokens * step.num_heads * (step.key_dim + step.value_dim)
    projection = step.proj[1]
    assert isinstance(projection, LinearNorm)
    macs = scores + _linear_norm_macs(projection, fewer)
    if hasattr(step, "qkv"):
        return macs + _linear_norm_macs(step.qkv, tokens), fewer
    queries = step.q[1]
    assert isinstance(queries, LinearNorm)
    return macs + _linear_norm_macs(step.kv, tokens) + _linear_norm_macs(queries, fewer), fewer


def _levit_block_macs(step: ResidualBlock, tokens: int) -> tuple[int, int]:
    """Return the MACs and the output size of a LeViT step, attention or MLP."""
    if isinstance(step.m, LevitAttention):
        return _levit_attention_macs(step.m, tokens)
    layers = [layer for layer in step.m.modules() if isinstance(layer, LinearNorm)]
    return sum(_linear_norm_macs(layer, tokens) for layer in layers), tokens


def _map_stitching_macs(step: MapStitchingLayer, side: int) -> tuple[int, int]:
    """Return a convolutional stitching layer's MACs and output size."""
    return _conv_macs(step.transform, side), side**2 if step.to_tokens else side


STEP_MACS: dict[type[nn.Module], Callable[[Any, int], tuple[int, int]]] = {
    Block: _vit_block_macs,
    SwinBlock: _swin_block_macs,
    PatchMerging: _merging_macs,
    BasicBlock: _resnet_block_macs,
    Bottleneck: _resnet_block_macs,
    InvertedResidual: _inverted_residual_macs,
    ResidualBlock: _levit_block_macs,
    LevitAttention: _levit_attention_macs,
    StitchingLayer: lambda step, tokens: (_linear_macs(step.transform, tokens), tokens),
    MapStitchingLayer: _map_stitching_macs,
    nn.Identity: lambda step, size: (0, size),
}
"""Counting rule of each kind of step: (step, input size) -> (MACs, output size)."""


def _classifier_macs(backbone: Backbone, size: int, *, final_norm: bool) -> int:
    """Return the MACs of the final norm, the pooling and the heads."""
    match backbone:
        case Vit():
            norm = LAYER_NORM * size * backbone.norm.normalized_shape[0] if final_norm else 0
            return norm + _linear_macs(backbone.head, 1)
        case Swin():
            norm = LAYER_NORM * size * backbone.head.in_features if final_norm else 0
            return norm + _linear_macs(backbone.head, 1)
        case ResNet():
            return POOLING * size**2 * backbone.fc.in_features + _linear_macs(backbone.fc, 1)
        case EfficientNetLite():
            head = _conv_macs(backbone._conv_head, size, backbone._bn1)
            pooled = POOLING * size**2 * backbone._fc.in_features
            return head + pooled + _linear_macs(backbone._fc, 1)
        case Levit():
            heads = [head for head in backbone.children() if isinstance(head, NormLinear)]
            return sum(_linear_macs(h.l, 1) + BATCH_NORM * h.l.in_features for h in heads)
    raise TypeError(f"anchor: expected a kind with a counting rule, got {type(backbone).__name__}")


def _embedding_parameters(backbone: Backbone) -> int:
    """Return the number of parameters before step 0."""
    return (
        sum(p.numel() for p in backbone.parameters())
        - sum(p.numel() for step in backbone.steps() for p in step.parameters())
        - _classifier_parameters(backbone)
    )


def _classifier_parameters(backbone: Backbone) -> int:
    """Return the number of parameters after the last step."""
    names = ("norm", "head", "fc", "head_dist", "_conv_head", "_bn1", "_fc")
    return sum(
        p.numel()
        for name, module in backbone.named_children()
        if name in names
        for p in module.parameters()
    )

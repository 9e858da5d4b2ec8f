"""The serving form of a stitched model: the same arithmetic without module dispatch.

At batch size 1 a small vision transformer spends a quarter of its time in `nn.Module.__call__` and
attribute look-ups (0.48 ms instead of 0.35 ms at width 48, depth 6, one thread). Each block is
therefore bound once to a function of its parameters. The parameters are shared with the model; only
position biases and, with layer scale, the scaled projections are computed once and stored.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ladderstitch.runtime.linear import serving_linear
from ladderstitch.vision.models.levit import LevitAttention, ResidualBlock
from ladderstitch.vision.models.nested.model import NestedModel
from ladderstitch.vision.models.nested.slices import Plan, Step
from ladderstitch.vision.models.parallel import find_serving_part
from ladderstitch.vision.models.route import Stitch
from ladderstitch.vision.models.stitched import Backbone, StitchedModel, StitchingLayer
from ladderstitch.vision.models.swin import SwinBlock, mix_windows
from ladderstitch.vision.models.vit import Block, ConvStem, Vit


class StitchExecutor:
    """A stitched or nested model as one plan per network, for inference only."""

    def __init__(self, model: StitchedModel | NestedModel) -> None:
        self.parameter_dtype = next(model.parameters()).dtype
        self.usable = [stitch.id for stitch in model.stitches if stitch.usable]
        if isinstance(model, NestedModel):
            self.plans = {stitch.id: model.plan(stitch.id) for stitch in model.stitches}
        else:
            self.plans = _bind_plans(model)

    def __call__(self, images: Tensor, stitch: int) -> Tensor:
        """Return float32 logits [B, num_classes] of images [B, C, H, W] on a stitch.

        Raises `KeyError` for an id that the family does not have.
        """
        return self.plans[stitch](images.to(self.parameter_dtype)).float()


def _bind_plans(model: StitchedModel) -> dict[int, Plan]:
    """Return the plan of every stitch; every block is bound once, and every group."""
    backbones = model.backbones()
    embeds = [bind_embedding(backbone) for backbone in backbones]
    steps = [backbone.steps() for backbone in backbones]

    @cache
    def bind_part(anchor: int, first: int, size: int) -> Step:
        return bind_step(find_serving_part(steps[anchor], first, size))

    return {
        stitch.id: Plan(
            embeds[stitch.front],
            tuple(_route_steps(stitch, bind_part, model)),
            bind_classifier(backbones[stitch.end], final_norm=stitch.final_norm),
        )
        for stitch in model.stitches
    }


def _route_steps(
    stitch: Stitch, bind_part: Callable[[int, int, int], Step], model: StitchedModel
) -> list[Step]:
    """Return the bound blocks, groups of blocks and stitching layers of a stitch in order."""
    steps: list[Step] = []
    for segment, layer in zip(stitch.segments, (*stitch.layers, None), strict=True):
        steps.extend(bind_part(segment.anchor, first, size) for first, size in segment.parts)
        if layer is not None:
            steps.append(bind_step(model.get_submodule(layer.removesuffix(".transform"))))
    return steps


def bind_linear(linear: nn.Linear) -> Step:
    """Return a linear map [.., K] -> [.., N] as a function."""
    weight, bias = linear.weight, linear.bias
    multiply = serving_linear(weight)
    return lambda x: multiply(x, weight, bias)


def bind_stitching_layer(linear: nn.Linear, *, uses_kernel: bool) -> Step:
    """Return a stitching layer's map [B, T, K] -> [B, T, N], by a Triton kernel or by a library.

    A `MapStitchingLayer` has no such form: its maps are [B, D, h, w] in this order of memory, while
    the kernel needs rows of D values. It would add two transpositions to cuDNN's one convolution.
    """
    if not uses_kernel:
        return bind_linear(linear)
    from ladderstitch_kernels.ops.stitch_linear import stitch_linear

    weight, bias = linear.weight, linear.bias

    def convert(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()  # [B * T, K]
        return stitch_linear(rows, weight, bias).view(*x.shape[:-1], -1)

    return convert


def bind_step(step: nn.Module) -> Step:
    """Return a block, stitching layer or downsampling as a function.

    A module without a faster form is returned unchanged.
    """
    if isinstance(step, Block):
        return bind_block(step)
    if isinstance(step, StitchingLayer):
        return bind_stitching_layer(step.transform, uses_kernel=step.transform.weight.is_cuda)
    if isinstance(step, SwinBlock):
        return bind_swin_block(step)
    if isinstance(step, LevitAttention):
        return partial(step, bias=step.attention_bias())
    if isinstance(step, ResidualBlock) and isinstance(step.m, LevitAttention):
        attend, bias = step.m, step.m.attention_bias()
        return lambda x: x + attend(x, bias)
    return step


def bind_embedding(backbone: Backbone) -> Step:
    """Return `Backbone.embed` as a function; a ViT's first tokens get their positions only once."""
    if not isinstance(backbone, Vit):
        return backbone.embed
    vit = backbone
    stem = _bind_stem(vit.patch_embed)
    first = vit.first_tokens()  # [1, n, D]
    positions: Tensor = vit.pos_embed  # of the patches only, or of all tokens
    if vit.class_token_position:
        n = first.shape[1]
        first, positions = first + positions[:, :n], positions[:, n:]

    def embed(images: Tensor) -> Tensor:
        patches = stem(images).flatten(2).transpose(1, 2)  # [B, T-n, D]
        return torch.cat((first.expand(images.shape[0], -1, -1), patches + positions), dim=1)

    return embed


def _bind_stem(stem: nn.Module) -> Step:
    """Return a convolutional stem as a function; other or unfolded stems are returned unchanged."""
    if not isinstance(stem, ConvStem) or any(isinstance(n, nn.BatchNorm2d) for n in stem.norms):
        return stem
    convs = [conv for conv in stem.convs if isinstance(conv, nn.Conv2d)]
    (weight0, bias0, stride0), *rest = ((c.weight, c.bias, c.stride[0]) for c in convs)

    def convolve(images: Tensor) -> Tensor:
        x = F.conv2d(images, weight0, bias0, stride0, padding=1)
        for weight, bias, stride in rest:
            x = F.conv2d(F.gelu(x), weight, bias, stride, padding=1)
        return x

    return convolve


def bind_block(block: Block) -> Step:
    """Return `Block.forward` on [B, T, D] as one function."""
    heads = block.attn.num_heads
    shape, eps1, eps2 = block.norm1.normalized_shape, block.norm1.eps, block.norm2.eps
    scale1, shift1 = block.norm1.weight, block.norm1.bias
    scale2, shift2 = block.norm2.weight, block.norm2.bias
    qkv_weight, qkv_bias = block.attn.qkv.weight, block.attn.qkv.bias
    proj_weight, proj_bias = _scaled(block.attn.proj, block.gamma_1 if block.layer_scale else None)
    fc1_weight, fc1_bias = block.mlp.fc1.weight, block.mlp.fc1.bias
    fc2_weight, fc2_bias = _scaled(block.mlp.fc2, block.gamma_2 if block.layer_scale else None)
    linear, norm, gelu = serving_linear(qkv_weight), F.layer_norm, F.gelu
    attend = F.scaled_dot_product_attention

    def forward(x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = linear(norm(x, shape, scale1, shift1, eps1), qkv_weight, qkv_bias)
        split = qkv.view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        q, k, v = split.unbind(0)  # 3 x [B, H, T, D/H]
        mixed = attend(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + linear(mixed, proj_weight, proj_bias)
        hidden = gelu(linear(norm(x, shape, scale2, shift2, eps2), fc1_weight, fc1_bias))
        return x + linear(hidden, fc2_weight, fc2_bias)

    return forward


def bind_swin_block(block: SwinBlock) -> Step:
    """Return `SwinBlock.forward` on [B, T, D] as one function."""
    heads, bias = block.attn.num_heads, block.attention_bias()
    split_windows, join_windows = block.split_windows, block.join_windows
    norm1, norm2 = block.norm1, block.norm2
    qkv, proj = bind_linear(block.attn.qkv), bind_linear(block.attn.proj)
    fc1, fc2 = bind_linear(block.mlp.fc1), bind_linear(block.mlp.fc2)

    def forward(x: Tensor) -> Tensor:
        mixed = mix_windows(qkv(split_windows(norm1(x))), bias, heads)
        x = x + join_windows(proj(mixed))
        return x + fc2(F.gelu(fc1(norm2(x))))

    return forward


def _scaled(linear: nn.Linear, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of gamma * linear(x)."""
    if gamma is None:
        return linear.weight, linear.bias
    return gamma[:, None] * linear.weight, gamma * linear.bias


def bind_classifier(backbone: Backbone, *, final_norm: bool) -> Step:
    """Return `Backbone.classify` as a function with logits [B, num_classes]."""
    if not isinstance(backbone, Vit) or hasattr(backbone, "head_dist"):
        return partial(backbone.classify, final_norm=final_norm)
    vit = backbone
    head = bind_linear(vit.head)
    if not final_norm:
        return lambda x: head(x[:, 0])
    norm = vit.norm
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: head(F.layer_norm(x[:, 0], shape, weight, bias, eps))

"""The serving form of a stitched model: the same arithmetic without module dispatch.

At batch size 1 a small vision transformer spends a quarter of its time in `nn.Module.__call__` and
attribute look-ups (0.48 ms against 0.35 ms at width 48, depth 6, one thread), so each block is
bound once to a function of its parameters. Parameters are shared with the model; what is made of
them once is position biases and, with layer scale, the scaled projections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ladderstitch.runtime.linear import serving_linear
from ladderstitch.vision.models.levit import LevitAttention, ResidualBlock
from ladderstitch.vision.models.route import Stitch
from ladderstitch.vision.models.stitched import Backbone, StitchedModel, StitchingLayer
from ladderstitch.vision.models.swin import SwinBlock, mix_windows
from ladderstitch.vision.models.vit import Block, ConvStem, Vit

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class StitchPlan:
    """Everything that one stitch runs, in order."""

    embed: Step
    blocks: tuple[Step, ...]
    classify: Step


class StitchExecutor:
    """Call it as the model: [B, C, H, W] images, stitch id -> [B, num_classes] float32 logits."""

    def __init__(self, model: StitchedModel) -> None:
        trunks = model.trunks()
        embeds = [bind_embedding(trunk) for trunk in trunks]
        blocks = [[bind_step(step) for step in trunk.steps()] for trunk in trunks]
        self.parameter_dtype = next(model.parameters()).dtype
        self.usable = [stitch.id for stitch in model.stitches if stitch.usable]
        self.plans = {
            stitch.id: StitchPlan(
                embeds[stitch.front],
                tuple(_steps(stitch, blocks, model)),
                bind_classifier(trunks[stitch.end], final_norm=stitch.final_norm),
            )
            for stitch in model.stitches
        }

    def __call__(self, images: Tensor, stitch: int) -> Tensor:
        plan = self.plans[stitch]
        x = plan.embed(images.to(self.parameter_dtype))
        for block in plan.blocks:
            x = block(x)
        return plan.classify(x).float()


def _steps(stitch: Stitch, blocks: list[list[Step]], model: StitchedModel) -> list[Step]:
    steps: list[Step] = []
    for segment, layer in zip(stitch.segments, (*stitch.layers, None), strict=True):
        steps.extend(blocks[segment.anchor][segment.first : segment.last + 1])
        if layer is not None:
            steps.append(bind_step(model.get_submodule(layer.removesuffix(".transform"))))
    return steps


def bind_linear(linear: nn.Linear) -> Step:
    weight, bias = linear.weight, linear.bias
    multiply = serving_linear(weight)
    return lambda x: multiply(x, weight, bias)


def bind_step(step: nn.Module) -> Step:
    """A block, stitching layer or downsampling; what has no leaner form stays a module."""
    if isinstance(step, Block):
        return bind_block(step)
    if isinstance(step, StitchingLayer):
        return bind_linear(step.transform)
    if isinstance(step, SwinBlock):
        return bind_swin_block(step)
    if isinstance(step, LevitAttention):
        return partial(step, bias=step.attention_bias())
    if isinstance(step, ResidualBlock) and isinstance(step.m, LevitAttention):
        attend, bias = step.m, step.m.attention_bias()
        return lambda x: x + attend(x, bias)
    return step


def bind_embedding(trunk: Backbone) -> Step:
    """`Backbone.embed`; for a ViT with the first tokens' positions added once."""
    if not isinstance(trunk, Vit):
        return trunk.embed
    vit = trunk
    stem = _bind_stem(vit.patch_embed)
    first = vit.first_tokens()  # [1, n, D]
    positions: Tensor = vit.pos_embed  # of the patches, or of all tokens
    if vit.class_token_position:
        n = first.shape[1]
        first, positions = first + positions[:, :n], positions[:, n:]

    def embed(images: Tensor) -> Tensor:
        patches = stem(images).flatten(2).transpose(1, 2)  # [B, T-n, D]
        return torch.cat((first.expand(len(images), -1, -1), patches + positions), dim=1)

    return embed


def _bind_stem(stem: nn.Module) -> Step:
    """Convolutions bound directly; any other stem, or one not folded yet, stays a module."""
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
    """`Block.forward` on [B, T, D] as one function."""
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
    """`SwinBlock.forward` on [B, T, D] as one function."""
    heads, bias = block.attn.num_heads, block.attention_bias()
    spread, gather = block.spread, block.gather
    norm1, norm2 = block.norm1, block.norm2
    qkv, proj = bind_linear(block.attn.qkv), bind_linear(block.attn.proj)
    fc1, fc2 = bind_linear(block.mlp.fc1), bind_linear(block.mlp.fc2)

    def forward(x: Tensor) -> Tensor:
        mixed = mix_windows(qkv(spread(norm1(x))), bias, heads)
        x = x + gather(proj(mixed))
        return x + fc2(F.gelu(fc1(norm2(x))))

    return forward


def _scaled(linear: nn.Linear, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of gamma * linear(x)."""
    if gamma is None:
        return linear.weight, linear.bias
    return gamma[:, None] * linear.weight, gamma * linear.bias


def bind_classifier(trunk: Backbone, *, final_norm: bool) -> Step:
    """`Backbone.classify`: [B, num_classes]."""
    if not isinstance(trunk, Vit) or hasattr(trunk, "head_dist"):
        return partial(trunk.classify, final_norm=final_norm)
    vit = trunk
    head = bind_linear(vit.head)
    if not final_norm:
        return lambda x: head(x[:, 0])
    norm = vit.norm
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: head(F.layer_norm(x[:, 0], shape, weight, bias, eps))

"""The vision transformer (DeiT) as an anchor, with a patch stem or a convolutional stem.

Module names are those of timm, so that published state dicts load without renaming.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from ladderstitch.vision.models.stitched import Backbone, fold


class InputShape(BaseModel):
    """Shape of a family's inputs and outputs, shared by all its anchors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int = Field(gt=0, le=4096, description="height and width, pixels")
    in_channels: int = Field(3, gt=0, le=16)
    num_classes: int = Field(gt=1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image, [C, H, W]."""
        return self.in_channels, self.image_size, self.image_size


class VitConfig(BaseModel):
    """Shape of one ViT anchor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    embed_dim: int = Field(gt=0)
    depth: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    mlp_ratio: float = Field(4.0, gt=0)
    qkv_bias: bool = True
    layer_norm_eps: float = Field(1e-6, gt=0)
    patch_size: int = Field(
        16, gt=0, description="pixels per side; unused with a convolutional stem"
    )
    stem: tuple[tuple[int, int], ...] = Field(
        (),
        description="(channels, stride) of each 3x3 convolution, the last with embed_dim channels "
        "(arXiv 2106.14881); empty: one patch convolution",
    )
    layer_scale: bool = Field(False, description="a learned factor per channel (DeiT-3)")
    class_token_position: bool = Field(
        True, description="whether the class token has a position (DeiT-3: no)"
    )
    distillation: Literal["none", "token", "heads"] = Field(
        "none", description="token: a second token (DeiT); heads: with a second head, averaged"
    )
    stem_batch_norm: bool = Field(
        False, description="batch normalisation between the stem's convolutions; folded for serving"
    )

    @model_validator(mode="after")
    def _check_widths(self) -> VitConfig:
        """Raise `ValueError` unless the heads divide the width and the stem ends with it."""
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of embed_dim {self.embed_dim}, got {self.num_heads}"
            )
        if self.stem and self.stem[-1][0] != self.embed_dim:
            raise ValueError(
                f"stem: expected embed_dim {self.embed_dim} channels last, got {self.stem[-1][0]}"
            )
        if any(channels < 1 or stride < 1 for channels, stride in self.stem):
            raise ValueError(f"stem: expected positive channels and strides, got {self.stem}")
        return self

    def build(self, inputs: InputShape) -> Vit:
        """Return the anchor with its initial weights."""
        return Vit(inputs, self)


class PatchStem(nn.Module):
    """One convolution over disjoint patches of p x p pixels: [B, C, H, W] -> [B, D, H/p, W/p]."""

    def __init__(self, in_channels: int, config: VitConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Conv2d(
            in_channels, config.embed_dim, config.patch_size, stride=config.patch_size
        )

    def grid(self, image_size: int) -> int:
        """Return the number of patches per side of an image of this size."""
        return image_size // self.patch_size

    def forward(self, images: Tensor) -> Tensor:
        """Return patches [B, D, H/p, W/p] of images [B, C, H, W]."""
        patches: Tensor = self.proj(images)
        return patches


class ConvStem(nn.Module):
    """3x3 convolutions with GELU between them (arXiv 2106.14881): [B, C, H, W] -> [B, D, h, w]."""

    def __init__(self, in_channels: int, config: VitConfig) -> None:
        super().__init__()
        widths = (in_channels, *(channels for channels, _ in config.stem))
        self.strides = tuple(stride for _, stride in config.stem)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=stride, padding=1)
            for (before, after), stride in zip(pairwise(widths), self.strides, strict=True)
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(channels) if config.stem_batch_norm else nn.Identity()
            for channels in widths[1:]
        )

    def grid(self, image_size: int) -> int:
        """Return the side of the output's grid for an image of this size."""
        for stride in self.strides:
            image_size = -(-image_size // stride)
        return image_size

    def forward(self, images: Tensor) -> Tensor:
        """Return features [B, D, h, w] of images [B, C, H, W]."""
        x = images
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(F.gelu(x) if index else x))
        return x

    def fold_batch_norm(self) -> None:
        """Fold the normalisation's running statistics into the convolutions; in place."""
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                self.convs[index], self.norms[index] = fold(conv, norm)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection of queries, keys and values."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention's output [B, T, D] for tokens [B, T, D]."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1)  # [B, T, 3, H, D/H]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x [B, H, T, D/H]
        mixed = F.scaled_dot_product_attention(q, k, v)  # [B, H, T, D/H]
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))  # [B, T, D]


class Mlp(nn.Module):
    """Two linear maps with an exact (erf) GELU between them; hidden width `ratio` times D."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = round(width * ratio)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP's output [B, T, D] for tokens [B, T, D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block, with layer scale if configured."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.mlp = Mlp(config.embed_dim, config.mlp_ratio)
        if config.layer_scale:
            self.gamma_1 = nn.Parameter(torch.ones(config.embed_dim))
            self.gamma_2 = nn.Parameter(torch.ones(config.embed_dim))
        self.layer_scale = config.layer_scale

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens [B, T, D] of tokens [B, T, D]."""
        attended = self.attn(self.norm1(x))
        x = x + (self.gamma_1 * attended if self.layer_scale else attended)
        mixed = self.mlp(self.norm2(x))
        return x + (self.gamma_2 * mixed if self.layer_scale else mixed)


class Vit(Backbone):
    """A ViT anchor."""

    def __init__(self, inputs: InputShape, config: VitConfig) -> None:
        super().__init__()
        stem = ConvStem if config.stem else PatchStem
        self.patch_embed = stem(inputs.in_channels, config)
        self.class_token_position = config.class_token_position
        tokens = self.patch_embed.grid(inputs.image_size) ** 2 + int(config.class_token_position)
        if config.distillation != "none":
            tokens += 1
            self.dist_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, config.embed_dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.embed_dim, inputs.num_classes)
        if config.distillation == "heads":
            self.head_dist = nn.Linear(config.embed_dim, inputs.num_classes)

    def first_tokens(self) -> Tensor:
        """Return the n tokens [1, n, D] before the patches: class and distillation token."""
        if hasattr(self, "dist_token"):
            return torch.cat((self.cls_token, self.dist_token), dim=1)
        return self.cls_token

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens [B, T, D] of images [B, C, H, W], the class token first."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # [B, T-1, D]
        first = self.first_tokens().expand(images.shape[0], -1, -1)
        if self.class_token_position:
            return torch.cat((first, patches), dim=1) + self.pos_embed
        return torch.cat((first, patches + self.pos_embed), dim=1)

    def steps(self) -> Sequence[nn.Module]:
        """Return the blocks in order."""
        return list(self.blocks)

    def classify(self, x: Tensor, *, final_norm: bool) -> Tensor:
        """Return the logits [B, num_classes] of tokens [B, T, D]; with two heads, their mean."""
        logits = self.head_logits(x, final_norm=final_norm)
        return logits[0] if len(logits) == 1 else (logits[0] + logits[1]) / 2

    def head_logits(self, x: Tensor, *, final_norm: bool) -> list[Tensor]:
        """Return the logits of the class token's head and, if configured, of the distillation head.

        x are tokens [B, T, D]; each entry is [B, num_classes].
        """
        heads = [self.head, self.head_dist] if hasattr(self, "head_dist") else [self.head]
        first = x[:, : len(heads)]
        if final_norm:
            first = self.norm(first)
        return [head(first[:, index]) for index, head in enumerate(heads)]

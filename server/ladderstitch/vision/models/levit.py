"""LeViT (arXiv 2104.01136) as an anchor; module names are upstream's.

Shapes use S for the side of the grid of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from ladderstitch.vision.models.stitched import Backbone, fold
from ladderstitch.vision.models.vit import InputShape

STEM_STRIDE = 16


class Subsample(BaseModel):
    """Shape of a downsampling between two stages: an attention with fewer queries, and an MLP."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key_dim: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    attn_ratio: int = Field(gt=0)
    mlp_ratio: int = Field(gt=0)
    stride: int = Field(2, gt=0)


class LevitConfig(BaseModel):
    """Shape of one LeViT anchor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["levit"] = "levit"
    embed_dim: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    key_dim: int = Field(gt=0)
    attn_ratio: tuple[int, ...]
    mlp_ratio: tuple[int, ...]
    subsamples: tuple[Subsample, ...]
    distilled: bool = Field(True, description="two heads whose logits are averaged")
    batch_norm_eps: float = Field(1e-5, gt=0)

    @model_validator(mode="after")
    def _check_stages(self) -> LevitConfig:
        """Raise `ValueError` unless all lists have one entry per stage."""
        stages = len(self.embed_dim)
        for name in ("depths", "num_heads", "attn_ratio", "mlp_ratio"):
            if len(getattr(self, name)) != stages:
                raise ValueError(f"{name}: expected {stages} stages, got {getattr(self, name)}")
        if len(self.subsamples) != stages - 1:
            raise ValueError(f"subsamples: expected {stages - 1}, got {len(self.subsamples)}")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the tokens of each stage."""
        return self.embed_dim

    @property
    def layout(self) -> Literal["tokens"]:
        """Layout of the features between steps."""
        return "tokens"

    @property
    def total_steps(self) -> int:
        """Number of steps: two per block and two per downsampling."""
        return 2 * sum(self.depths) + 2 * len(self.subsamples)

    def span(self, stage: int, block: int) -> tuple[int, int]:
        """Return the first and the last step of a stage's block: attention and MLP."""
        first = 2 * sum(self.depths[:stage]) + 2 * stage + 2 * block
        return first, first + 1

    def build(self, inputs: InputShape) -> Levit:
        """Return the anchor with its initial weights."""
        return Levit(inputs, self)


class ConvNorm(nn.Module):
    """A 3x3 convolution of stride 2 with batch normalisation."""

    def __init__(self, before: int, after: int, eps: float) -> None:
        super().__init__()
        self.c = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(after, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Return maps [B, D_out, h/2, w/2] of maps [B, D_in, h, w]."""
        return self.bn(self.c(x))

    def fold_batch_norm(self) -> None:
        """Fold the norm into the layer before it; in place."""
        self.c, self.bn = fold(self.c, self.bn)


class LinearNorm(nn.Module):
    """A linear map with batch normalisation over all tokens of the batch."""

    def __init__(self, before: int, after: int, eps: float) -> None:
        super().__init__()
        self.c = nn.Linear(before, after, bias=False)
        self.bn: nn.Module = nn.BatchNorm1d(after, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens [B, T, D_out] of tokens [B, T, D_in]."""
        y: Tensor = self.c(x)
        if isinstance(self.bn, nn.Identity):
            return y
        return self.bn(y.flatten(0, 1)).view_as(y)

    def fold_batch_norm(self) -> None:
        """Fold the norm into the layer before it; in place."""
        self.c, self.bn = fold(self.c, self.bn)


class ResidualBlock(nn.Module):
    """A residual connection around a module m."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        """Return x + m(x) for tokens [B, T, D]."""
        return x + self.m(x)


class LevitAttention(nn.Module):
    """Attention over a grid of S * S tokens, with queries at every `stride`-th row and column.

    The bias of a score depends on the distances of query and key along each axis.
    """

    def __init__(
        self,
        widths: tuple[int, int],
        op: Subsample,
        resolution: int,
        eps: float,
        *,
        fused: bool,
    ) -> None:
        super().__init__()
        before, after = widths
        self.num_heads, self.key_dim = op.num_heads, op.key_dim
        self.value_dim = op.attn_ratio * op.key_dim
        self.resolution, self.stride = resolution, op.stride
        keys, values = op.num_heads * op.key_dim, op.num_heads * self.value_dim
        if fused:
            self.qkv = LinearNorm(before, 2 * keys + values, eps)
        else:
            self.kv = LinearNorm(before, keys + values, eps)
            self.q = nn.Sequential(nn.Identity(), LinearNorm(before, keys, eps))
        self.proj = nn.Sequential(nn.Hardswish(), LinearNorm(values, after, eps))
        self.index, offsets = _bias_index(resolution, op.stride)
        self.attention_biases = nn.Parameter(torch.zeros(op.num_heads, offsets))

    def attention_bias(self) -> Tensor:
        """Return the bias [H, queries, keys] of the scores."""
        return self.attention_biases[:, self.index.to(self.attention_biases.device)]

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the output [B, queries, D_out] for tokens [B, S * S, D_in].

        `bias` is the result of `attention_bias()`, for callers that keep it between calls.
        """
        if hasattr(self, "qkv"):
            parts = self._split_heads(self.qkv(x), 2 * self.key_dim + self.value_dim)
            q, k, v = parts.split((self.key_dim, self.key_dim, self.value_dim), dim=-1)
        else:
            parts = self._split_heads(self.kv(x), self.key_dim + self.value_dim)
            k, v = parts.split((self.key_dim, self.value_dim), dim=-1)
            grid = x.view(x.shape[0], self.resolution, self.resolution, -1)
            fewer = grid[:, :: self.stride, :: self.stride].flatten(1, 2)
            q = self._split_heads(self.q(fewer), self.key_dim)
        bias = self.attention_bias() if bias is None else bias
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor, width: int) -> Tensor:
        """Return [B, H, T, width] of [B, T, H * width]."""
        return x.view(x.shape[0], -1, self.num_heads, width).transpose(1, 2)


def _bias_index(resolution: int, stride: int) -> tuple[Tensor, int]:
    """Return the bias number of each (query, key), in order of first use, and their count."""
    keys = list(product(range(resolution), repeat=2))
    queries = [
        (y * stride, x * stride) for y, x in product(range(-(-resolution // stride)), repeat=2)
    ]
    numbers: dict[tuple[int, int], int] = {}
    index = [
        [numbers.setdefault((abs(qy - ky), abs(qx - kx)), len(numbers)) for ky, kx in keys]
        for qy, qx in queries
    ]
    # on the CPU, because weights are loaded into models that are built on the meta device
    return torch.tensor(index, device="cpu"), len(numbers)


def _mlp(width: int, ratio: int, eps: float) -> ResidualBlock:
    """Return a residual MLP with a Hardswish and a hidden width of `ratio` times `width`."""
    return ResidualBlock(
        nn.Sequential(
            LinearNorm(width, ratio * width, eps),
            nn.Hardswish(),
            LinearNorm(ratio * width, width, eps),
        )
    )


class NormLinear(nn.Module):
    """A linear classifier with a batch normalisation before it."""

    def __init__(self, width: int, classes: int, eps: float) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(width, eps=eps)
        self.l = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, num_classes] of features [B, D]."""
        return self.l(self.bn(x))


class Levit(Backbone):
    """A LeViT anchor."""

    def __init__(self, inputs: InputShape, config: LevitConfig) -> None:
        super().__init__()
        eps, widths = config.batch_norm_eps, config.embed_dim
        stem = (inputs.in_channels, *(widths[0] // part for part in (8, 4, 2, 1)))
        layers: list[nn.Module] = []
        for before, after in pairwise(stem):
            layers.extend((ConvNorm(before, after, eps), nn.Hardswish()))
        self.patch_embed = nn.Sequential(*layers[:-1])
        resolution = inputs.image_size // STEM_STRIDE
        blocks: list[nn.Module] = []
        for stage, width in enumerate(widths):
            own = Subsample(
                key_dim=config.key_dim,
                num_heads=config.num_heads[stage],
                attn_ratio=config.attn_ratio[stage],
                mlp_ratio=config.mlp_ratio[stage],
                stride=1,
            )
            for _ in range(config.depths[stage]):
                attention = LevitAttention((width, width), own, resolution, eps, fused=True)
                blocks.extend((ResidualBlock(attention), _mlp(width, own.mlp_ratio, eps)))
            if stage + 1 < len(widths):
                op, after = config.subsamples[stage], widths[stage + 1]
                blocks.append(LevitAttention((width, after), op, resolution, eps, fused=False))
                blocks.append(_mlp(after, op.mlp_ratio, eps))
                resolution = -(-resolution // op.stride)
        self.blocks = nn.Sequential(*blocks)
        self.head = NormLinear(widths[-1], inputs.num_classes, eps)
        if config.distilled:
            self.head_dist = NormLinear(widths[-1], inputs.num_classes, eps)

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens [B, T, D] of images [B, C, H, W], row by row."""
        return self.patch_embed(images).flatten(2).transpose(1, 2)

    def steps(self) -> Sequence[nn.Module]:
        """Return the attentions and MLPs of all stages and downsamplings in order."""
        return list(self.blocks)

    def classify(self, x: Tensor, *, final_norm: bool) -> Tensor:
        """Return the logits [B, num_classes] of the tokens' mean; heads have their own norm."""
        mean = x.mean(1)
        if not hasattr(self, "head_dist"):
            return self.head(mean)
        return (self.head(mean) + self.head_dist(mean)) / 2

"""LeViT (arXiv 2104.01136) as an anchor; module names are upstream's."""

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
    """What stands between two stages: an attention whose queries are fewer, and an MLP."""

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
    distilled: bool = Field(True, description="two heads, whose logits are averaged")
    batch_norm_eps: float = Field(1e-5, gt=0)

    @model_validator(mode="after")
    def _stages_agree(self) -> LevitConfig:
        stages = len(self.embed_dim)
        for name in ("depths", "num_heads", "attn_ratio", "mlp_ratio"):
            if len(getattr(self, name)) != stages:
                raise ValueError(f"{name}: expected {stages} stages, got {getattr(self, name)}")
        if len(self.subsamples) != stages - 1:
            raise ValueError(f"subsamples: expected {stages - 1}, got {len(self.subsamples)}")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        return self.embed_dim

    @property
    def layout(self) -> Literal["tokens"]:
        return "tokens"

    @property
    def total_steps(self) -> int:
        return 2 * sum(self.depths) + 2 * len(self.subsamples)

    def span(self, stage: int, block: int) -> tuple[int, int]:
        """A block is two steps, attention and MLP; so is what stands between stages."""
        first = 2 * sum(self.depths[:stage]) + 2 * stage + 2 * block
        return first, first + 1

    def build(self, inputs: InputShape) -> Levit:
        return Levit(inputs, self)


class ConvNorm(nn.Module):
    """A 3x3 convolution of stride 2 and its normalisation."""

    def __init__(self, before: int, after: int, eps: float) -> None:
        super().__init__()
        self.c = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(after, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))

    def fold_batch_norm(self) -> None:
        self.c, self.bn = fold(self.c, self.bn)


class LinearNorm(nn.Module):
    """A linear map of [B, T, D] and its normalisation over all tokens."""

    def __init__(self, before: int, after: int, eps: float) -> None:
        super().__init__()
        self.c = nn.Linear(before, after, bias=False)
        self.bn: nn.Module = nn.BatchNorm1d(after, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(x)
        if isinstance(self.bn, nn.Identity):
            return y
        return self.bn(y.flatten(0, 1)).view_as(y)

    def fold_batch_norm(self) -> None:
        self.c, self.bn = fold(self.c, self.bn)


class ResidualBlock(nn.Module):
    """x + m(x)."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)


class LevitAttention(nn.Module):
    """Attention over a grid [B, R * R, D]; queries of every `stride`-th row and column.

    Scores are biased by how far query and key are apart, along each axis.
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
        self.index, offsets = _offsets(resolution, op.stride)
        self.attention_biases = nn.Parameter(torch.zeros(op.num_heads, offsets))

    def attention_bias(self) -> Tensor:
        """[H, queries, keys]."""
        return self.attention_biases[:, self.index.to(self.attention_biases.device)]

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`bias` is `attention_bias()`, for those who keep it between calls."""
        if hasattr(self, "qkv"):
            parts = self._heads(self.qkv(x), 2 * self.key_dim + self.value_dim)
            q, k, v = parts.split((self.key_dim, self.key_dim, self.value_dim), dim=-1)
        else:
            parts = self._heads(self.kv(x), self.key_dim + self.value_dim)
            k, v = parts.split((self.key_dim, self.value_dim), dim=-1)
            grid = x.view(len(x), self.resolution, self.resolution, -1)
            fewer = grid[:, :: self.stride, :: self.stride].flatten(1, 2)
            q = self._heads(self.q(fewer), self.key_dim)
        bias = self.attention_bias() if bias is None else bias
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, width: int) -> Tensor:
        """[B, T, H * w] -> [B, H, T, w]."""
        return x.view(len(x), -1, self.num_heads, width).transpose(1, 2)


def _offsets(resolution: int, stride: int) -> tuple[Tensor, int]:
    """Which bias each pair of query and key gets, numbered as first met, and how many there are."""
    keys = list(product(range(resolution), repeat=2))
    queries = [
        (y * stride, x * stride) for y, x in product(range(-(-resolution // stride)), repeat=2)
    ]
    numbers: dict[tuple[int, int], int] = {}
    index = [
        [numbers.setdefault((abs(qy - ky), abs(qx - kx)), len(numbers)) for ky, kx in keys]
        for qy, qx in queries
    ]
    return torch.tensor(index), len(numbers)


def _mlp(width: int, ratio: int, eps: float) -> ResidualBlock:
    return ResidualBlock(
        nn.Sequential(
            LinearNorm(width, ratio * width, eps),
            nn.Hardswish(),
            LinearNorm(ratio * width, width, eps),
        )
    )


class NormLinear(nn.Module):
    """A classifier with a normalisation before it."""

    def __init__(self, width: int, classes: int, eps: float) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(width, eps=eps)
        self.l = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.bn(x))


class Levit(Backbone):
    """One LeViT anchor."""

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
        """[B, C, H, W] images -> [B, T, D] tokens, row by row."""
        return self.patch_embed(images).flatten(2).transpose(1, 2)

    def steps(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def classify(self, x: Tensor, *, final_norm: bool) -> Tensor:
        """[B, T, D] -> [B, num_classes] logits of the mean; the heads hold their own norm."""
        mean = x.mean(1)
        if not hasattr(self, "head_dist"):
            return self.head(mean)
        return (self.head(mean) + self.head_dist(mean)) / 2

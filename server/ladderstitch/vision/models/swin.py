"""The Swin transformer (arXiv 2103.14030) as an anchor; module names are upstream's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from ladderstitch.vision.models.stitched import Backbone
from ladderstitch.vision.models.vit import InputShape, Mlp

OUTSIDE = -100.0
"""Added to the score of two tokens that the shift brought into one window but not together."""


class SwinConfig(BaseModel):
    """Shape of one Swin anchor; widths double from stage to stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["swin"] = "swin"
    embed_dim: int = Field(gt=0)
    depths: tuple[int, ...] = Field(min_length=1)
    num_heads: tuple[int, ...]
    window_size: int = Field(7, gt=0, description="tokens a side")
    patch_size: int = Field(4, gt=0, description="pixels a side")
    mlp_ratio: float = Field(4.0, gt=0)
    qkv_bias: bool = True
    layer_norm_eps: float = Field(1e-5, gt=0)

    @model_validator(mode="after")
    def _stages_fit(self) -> SwinConfig:
        if len(self.num_heads) != len(self.depths):
            raise ValueError(f"num_heads: expected {len(self.depths)} stages, got {self.num_heads}")
        for width, heads in zip(self.widths, self.num_heads, strict=True):
            if width % heads:
                raise ValueError(f"num_heads: expected divisors of {self.widths}, got {heads}")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.embed_dim * 2**stage for stage in range(len(self.depths)))

    @property
    def layout(self) -> Literal["tokens"]:
        return "tokens"

    @property
    def total_steps(self) -> int:
        return sum(self.depths) + len(self.depths) - 1

    def span(self, stage: int, block: int) -> tuple[int, int]:
        """First and last step of a stage's block; downsamplings stand between stages."""
        step = sum(self.depths[:stage]) + stage + block
        return step, step

    def build(self, inputs: InputShape) -> Swin:
        return Swin(inputs, self)


class PatchEmbed(nn.Module):
    """[B, C, H, W] -> [B, T, D]: a convolution over disjoint patches, then a norm."""

    def __init__(self, in_channels: int, config: SwinConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(in_channels, config.embed_dim, size, stride=size)
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.proj(images).flatten(2).transpose(1, 2))


class WindowAttention(nn.Module):
    """Self-attention within windows of N = window^2 tokens, with a relative position bias."""

    def __init__(self, width: int, heads: int, window: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def position_bias(self) -> Tensor:
        """[H, N, N]."""
        side = torch.arange(self.window, device=self.relative_position_bias_table.device)
        y, x = torch.meshgrid(side, side, indexing="ij")
        at = torch.stack((y.flatten(), x.flatten()))  # [2, N]
        apart = at[:, :, None] - at[:, None, :] + self.window - 1
        index = apart[0] * (2 * self.window - 1) + apart[1]  # [N, N]
        return self.relative_position_bias_table[index].permute(2, 0, 1)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """[B, W, N, D] windows; bias [W or 1, H, N, N]."""
        return self.proj(mix_windows(self.qkv(x), bias, self.num_heads))


def mix_windows(qkv: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Attention within windows: [B, W, N, 3 D] -> [B, W, N, D].

    Windows stand beside the batch: with a dimension of their own the fast kernels do not apply.
    """
    batch, windows, tokens, width = qkv.shape
    split = qkv.view(batch * windows, tokens, 3, heads, -1)
    q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x [B * W, H, N, d]
    if batch > 1 and len(bias) > 1:
        bias = bias.repeat(batch, 1, 1, 1)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return mixed.transpose(1, 2).reshape(batch, windows, tokens, width // 3)


class SwinBlock(nn.Module):
    """Pre-norm block on [B, T, D]; every second one shifts its windows by half."""

    def __init__(self, config: SwinConfig, stage: int, index: int, resolution: int) -> None:
        super().__init__()
        width = config.widths[stage]
        self.resolution = resolution
        self.window = min(config.window_size, resolution)
        shifts = index % 2 == 1 and resolution > config.window_size
        self.shift = config.window_size // 2 if shifts else 0
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attn = WindowAttention(width, config.num_heads[stage], self.window, config.qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = Mlp(width, config.mlp_ratio)

    def attention_bias(self) -> Tensor:
        """[W or 1, H, N, N]: position bias, and what keeps strangers in a shifted window apart."""
        bias = self.attn.position_bias().unsqueeze(0)
        if not self.shift:
            return bias
        side = torch.arange(self.resolution, device=bias.device)
        edges = torch.tensor([self.resolution - self.window, self.resolution - self.shift])
        band = torch.bucketize(side, edges.to(bias.device), right=True)  # 0, 1, 2
        region = band[:, None] * 3 + band[None, :]  # [R, R]
        groups = self._windows(region.view(1, -1, 1)).squeeze(0).squeeze(-1)  # [W, N]
        apart = groups[:, :, None] != groups[:, None, :]  # [W, N, N]
        return bias + apart.unsqueeze(1) * torch.full_like(bias[:1, :1, :1, :1], OUTSIDE)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`bias` is `attention_bias()`, for those who keep it between calls."""
        if bias is None:
            bias = self.attention_bias()
        x = x + self.gather(self.attn(self.spread(self.norm1(x)), bias))
        return x + self.mlp(self.norm2(x))

    def spread(self, x: Tensor) -> Tensor:
        """[B, R * R, D] tokens, row by row -> [B, W, N, D] windows, shifted if the block shifts."""
        if self.shift:
            grid = x.view(len(x), self.resolution, self.resolution, -1)
            x = grid.roll((-self.shift, -self.shift), (1, 2)).flatten(1, 2)
        return self._windows(x)

    def gather(self, windows: Tensor) -> Tensor:
        """`spread`, backwards."""
        whole = self._whole(windows)
        if self.shift:
            whole = whole.roll((self.shift, self.shift), (1, 2))
        return whole.flatten(1, 2)

    def _windows(self, x: Tensor) -> Tensor:
        """[B, R * R, D] -> [B, W, N, D]."""
        count = self.resolution // self.window
        split = x.view(len(x), count, self.window, count, self.window, -1)
        return split.transpose(2, 3).reshape(len(x), count**2, self.window**2, -1)

    def _whole(self, windows: Tensor) -> Tensor:
        """[B, W, N, D] -> [B, R, R, D]."""
        count = self.resolution // self.window
        split = windows.view(len(windows), count, count, self.window, self.window, -1)
        whole = split.transpose(2, 3)
        return whole.reshape(len(windows), self.resolution, self.resolution, -1)


class PatchMerging(nn.Module):
    """[B, R * R, D] -> [B, R * R / 4, 2 D]: four neighbours become one token."""

    def __init__(self, width: int, resolution: int, eps: float) -> None:
        super().__init__()
        self.resolution = resolution
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        half = self.resolution // 2
        pairs = x.view(len(x), half, 2, half, 2, -1)
        merged = pairs.permute(0, 1, 3, 4, 2, 5)  # column before row: upstream's order
        return self.reduction(self.norm(merged.reshape(len(x), half * half, -1)))


class Stage(nn.Module):
    """Blocks of one resolution, and the downsampling after them."""

    def __init__(self, config: SwinConfig, stage: int, resolution: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(config, stage, index, resolution) for index in range(config.depths[stage])
        )
        if stage + 1 < len(config.depths):
            self.downsample = PatchMerging(config.widths[stage], resolution, config.layer_norm_eps)


class Swin(Backbone):
    """One Swin anchor."""

    def __init__(self, inputs: InputShape, config: SwinConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(inputs.in_channels, config)
        side = inputs.image_size // config.patch_size
        self.layers = nn.ModuleList(
            Stage(config, stage, _resolution(side, stage, config))
            for stage in range(len(config.depths))
        )
        self.norm = nn.LayerNorm(config.widths[-1], eps=config.layer_norm_eps)
        self.head = nn.Linear(config.widths[-1], inputs.num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """[B, C, H, W] images -> [B, T, D] tokens, row by row."""
        return self.patch_embed(images)

    def steps(self) -> Sequence[nn.Module]:
        found: list[nn.Module] = []
        for stage in self.layers:
            assert isinstance(stage, Stage)
            found.extend(stage.blocks)
            found.extend([stage.downsample] if hasattr(stage, "downsample") else [])
        return found

    def classify(self, x: Tensor, *, final_norm: bool) -> Tensor:
        """[B, T, D] tokens -> [B, num_classes] logits of their mean."""
        if final_norm:
            x = self.norm(x)
        return self.head(x.mean(1))


def _resolution(side: int, stage: int, config: SwinConfig) -> int:
    """Tokens a side of a stage; raises `ValueError` if windows do not tile it."""
    resolution = side >> stage
    if resolution << stage != side or (
        resolution > config.window_size and resolution % config.window_size
    ):
        raise ValueError(
            f"image_size: expected stages that windows of {config.window_size} tile, got "
            f"{side / 2**stage:g} patches a side in stage {stage}"
        )
    return resolution

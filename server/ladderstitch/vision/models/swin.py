"""The Swin transformer (arXiv 2103.14030) as an anchor; module names are upstream's.

Shapes use S for the side of the grid of tokens, N for the tokens of a window, and W for the number
of windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from ladderstitch.vision.models.stitched import Backbone
from ladderstitch.vision.models.vit import InputShape, Mlp

MASKED_SCORE = -100.0
"""Added to the score of two tokens that share a window only because of the shift."""


class SwinConfig(BaseModel):
    """Shape of one Swin anchor; widths double from stage to stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["swin"] = "swin"
    embed_dim: int = Field(gt=0)
    depths: tuple[int, ...] = Field(min_length=1)
    num_heads: tuple[int, ...]
    window_size: int = Field(7, gt=0, description="tokens per side")
    patch_size: int = Field(4, gt=0, description="pixels per side")
    mlp_ratio: float = Field(4.0, gt=0)
    qkv_bias: bool = True
    layer_norm_eps: float = Field(1e-5, gt=0)

    @model_validator(mode="after")
    def _check_stages(self) -> SwinConfig:
        """Raise `ValueError` unless every stage has a number of heads that divides its width."""
        if len(self.num_heads) != len(self.depths):
            raise ValueError(f"num_heads: expected {len(self.depths)} stages, got {self.num_heads}")
        for width, heads in zip(self.widths, self.num_heads, strict=True):
            if width % heads:
                raise ValueError(f"num_heads: expected divisors of {self.widths}, got {heads}")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the tokens of each stage."""
        return tuple(self.embed_dim * 2**stage for stage in range(len(self.depths)))

    @property
    def layout(self) -> Literal["tokens"]:
        """Layout of the features between steps."""
        return "tokens"

    @property
    def total_steps(self) -> int:
        """Number of steps: all blocks and the downsamplings between stages."""
        return sum(self.depths) + len(self.depths) - 1

    def span(self, stage: int, block: int) -> tuple[int, int]:
        """Return the first and the last step of a stage's block, counting downsamplings."""
        step = sum(self.depths[:stage]) + stage + block
        return step, step

    def build(self, inputs: InputShape) -> Swin:
        """Return the anchor with its initial weights."""
        return Swin(inputs, self)


class PatchEmbed(nn.Module):
    """A convolution over disjoint patches, then a norm."""

    def __init__(self, in_channels: int, config: SwinConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(in_channels, config.embed_dim, size, stride=size)
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)

    def forward(self, images: Tensor) -> Tensor:
        """Return tokens [B, T, D] of images [B, C, H, W]."""
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
        """Return the bias [H, N, N] of every pair of positions in a window."""
        side = torch.arange(self.window, device=self.relative_position_bias_table.device)
        y, x = torch.meshgrid(side, side, indexing="ij")
        position = torch.stack((y.flatten(), x.flatten()))  # [2, N]
        offset = position[:, :, None] - position[:, None, :] + self.window - 1
        index = offset[0] * (2 * self.window - 1) + offset[1]  # [N, N]
        return self.relative_position_bias_table[index].permute(2, 0, 1)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Return the attention's output for windows [B, W, N, D]; bias is [W or 1, H, N, N]."""
        return self.proj(mix_windows(self.qkv(x), bias, self.num_heads))


def mix_windows(qkv: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Return the attention within windows [B, W, N, D] of projections [B, W, N, 3 D].

    Windows are folded into the batch dimension: fast kernels do not accept a separate dimension.
    """
    batch, windows, tokens, width = qkv.shape
    split = qkv.view(batch * windows, tokens, 3, heads, -1)
    q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x [B * W, H, N, d]
    if batch > 1 and len(bias) > 1:
        bias = bias.repeat(batch, 1, 1, 1)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return mixed.transpose(1, 2).reshape(batch, windows, tokens, width // 3)


class SwinBlock(nn.Module):
    """A pre-norm block on tokens [B, S * S, D]; every second block shifts its windows by half."""

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
        """Return the position bias [W or 1, H, N, N], with the mask of the shifted windows.

        The mask separates tokens that are not neighbours in the image.
        """
        bias = self.attn.position_bias().unsqueeze(0)
        if not self.shift:
            return bias
        side = torch.arange(self.resolution, device=bias.device)
        edges = torch.tensor([self.resolution - self.window, self.resolution - self.shift])
        band = torch.bucketize(side, edges.to(bias.device), right=True)  # 0, 1, 2
        region = band[:, None] * 3 + band[None, :]  # [S, S]
        groups = self._tile(region.view(1, -1, 1)).squeeze(0).squeeze(-1)  # [W, N]
        masked = groups[:, :, None] != groups[:, None, :]  # [W, N, N]
        return bias + masked.unsqueeze(1) * torch.full_like(bias[:1, :1, :1, :1], MASKED_SCORE)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return tokens [B, S * S, D] of tokens [B, S * S, D].

        `bias` is the result of `attention_bias()`, for callers that keep it between calls.
        """
        if bias is None:
            bias = self.attention_bias()
        x = x + self.join_windows(self.attn(self.split_windows(self.norm1(x)), bias))
        return x + self.mlp(self.norm2(x))

    def split_windows(self, x: Tensor) -> Tensor:
        """Return windows [B, W, N, D] of tokens [B, S * S, D], shifted if the block shifts."""
        if self.shift:
            grid = x.view(x.shape[0], self.resolution, self.resolution, -1)
            x = grid.roll((-self.shift, -self.shift), (1, 2)).flatten(1, 2)
        return self._tile(x)

    def join_windows(self, windows: Tensor) -> Tensor:
        """Return tokens [B, S * S, D] of windows [B, W, N, D]: the inverse of `split_windows`."""
        grid = self._untile(windows)
        if self.shift:
            grid = grid.roll((self.shift, self.shift), (1, 2))
        return grid.flatten(1, 2)

    def _tile(self, x: Tensor) -> Tensor:
        """Return windows [B, W, N, D] of tokens [B, S * S, D]."""
        count = self.resolution // self.window
        split = x.view(x.shape[0], count, self.window, count, self.window, -1)
        return split.transpose(2, 3).reshape(x.shape[0], count**2, self.window**2, -1)

    def _untile(self, windows: Tensor) -> Tensor:
        """Return the grid [B, S, S, D] of windows [B, W, N, D]."""
        count = self.resolution // self.window
        split = windows.view(windows.shape[0], count, count, self.window, self.window, -1)
        rows = split.transpose(2, 3)
        return rows.reshape(windows.shape[0], self.resolution, self.resolution, -1)


class PatchMerging(nn.Module):
    """A downsampling that merges four neighbouring tokens into one of twice the width."""

    def __init__(self, width: int, resolution: int, eps: float) -> None:
        super().__init__()
        self.resolution = resolution
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens [B, S * S / 4, 2 D] of tokens [B, S * S, D]."""
        half = self.resolution // 2
        pairs = x.view(x.shape[0], half, 2, half, 2, -1)
        merged = pairs.permute(0, 1, 3, 4, 2, 5)  # upstream's order: column before row
        return self.reduction(self.norm(merged.reshape(x.shape[0], half * half, -1)))


class Stage(nn.Module):
    """The blocks of one resolution, followed by a downsampling except in the last stage."""

    def __init__(self, config: SwinConfig, stage: int, resolution: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(config, stage, index, resolution) for index in range(config.depths[stage])
        )
        if stage + 1 < len(config.depths):
            self.downsample = PatchMerging(config.widths[stage], resolution, config.layer_norm_eps)


class Swin(Backbone):
    """A Swin anchor."""

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
        """Return the tokens [B, T, D] of images [B, C, H, W], row by row."""
        return self.patch_embed(images)

    def steps(self) -> Sequence[nn.Module]:
        """Return the blocks and downsamplings of all stages in order."""
        steps: list[nn.Module] = []
        for stage in self.layers:
            assert isinstance(stage, Stage)
            steps.extend(stage.blocks)
            steps.extend([stage.downsample] if hasattr(stage, "downsample") else [])
        return steps

    def classify(self, x: Tensor, *, final_norm: bool) -> Tensor:
        """Return the logits [B, num_classes] of the mean of tokens [B, T, D]."""
        if final_norm:
            x = self.norm(x)
        return self.head(x.mean(1))


def _resolution(side: int, stage: int, config: SwinConfig) -> int:
    """Return the tokens per side of a stage; raises `ValueError` if windows do not tile it."""
    resolution = side >> stage
    if resolution << stage != side or (
        resolution > config.window_size and resolution % config.window_size
    ):
        raise ValueError(
            f"image_size: expected stages that windows of {config.window_size} tile, got "
            f"{side / 2**stage:g} patches per side in stage {stage}"
        )
    return resolution

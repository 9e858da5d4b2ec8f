"""Rotary position embedding in the half-split layout, with Llama 3's scaling (arXiv 2104.09864)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ladderstitch.text.model.config import LlamaConfig, RopeScaling


def rotation_tables(config: LlamaConfig, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [positions, head_dim], float32, for `rotate`."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequencies = config.rope_theta**-half
    if config.rope_scaling is not None:
        frequencies = _scaled(frequencies, config.rope_scaling)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
    sines = angles.sin()
    cosines = torch.cat((angles.cos(), angles.cos()), dim=-1)
    return cosines.float(), torch.cat((-sines, sines), dim=-1).float()


def rotate(x: Tensor, cosines: Tensor, signed_sines: Tensor) -> Tensor:
    """[N, H, d] with tables [N, 1, d]: pairs (i, i + d/2) turned by their angles."""
    return x * cosines + x.roll(x.shape[-1] // 2, -1) * signed_sines


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Slower rotations: all of them, or (Llama 3) those that do not turn within the old context."""
    slow = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slow
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return blend * frequencies + (1 - blend) * slow

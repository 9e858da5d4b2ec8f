"""Rotary position embedding (arXiv 2104.09864) and its scalings for long contexts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ladderstitch.text.model.config import DecoderConfig, RopeScaling


def rotation_tables(
    config: DecoderConfig, positions: int, kind: str = "main"
) -> tuple[Tensor, Tensor]:
    """Return cosines and signed sines for `rotate`, both [positions, d] float32.

    `kind` is one of `DecoderConfig.layer_rotations`. Pairs of dimensions that do not rotate have
    the frequency 0. The longest context, by which `longrope` chooses, is that of `config`.
    """
    frequencies = torch.zeros(config.head_dim // 2, dtype=torch.float64)
    factor = 1.0
    if kind != "none":
        dim = config.rotary_dim or config.head_dim
        theta, scaling = config.rope_theta, config.rope_scaling
        if kind == "windowed":
            assert config.windowed_rope_theta is not None
            theta, scaling = config.windowed_rope_theta, None
        frequencies[: dim // 2] = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        if scaling is not None:
            factor = scaling.attention_factor
            frequencies[: dim // 2] = _scale(
                frequencies[: dim // 2], scaling, theta, config.max_positions
            )
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
    rotated = frequencies != 0
    cosines = torch.where(rotated, angles.cos() * factor, angles.cos())
    sines = angles.sin() * factor
    return torch.cat((cosines, cosines), -1).float(), torch.cat((-sines, sines), -1).float()


def rotate(x: Tensor, cosines: Tensor, signed_sines: Tensor) -> Tensor:
    """Return x [T, H, d] with each pair (i, i + d/2) rotated; the tables are [T, 1, d]."""
    return x * cosines + x.roll(x.shape[-1] // 2, -1) * signed_sines


def pair_order(head_dim: int, rotary_dim: int, *, interleaved: bool) -> list[int]:
    """Return the order of a head's dimensions in which the pairs are (i, i + d/2).

    In a checkpoint, the first `rotary_dim` dimensions rotate: in pairs (2i, 2i + 1) if
    `interleaved`, else in pairs (i, i + rotary_dim/2). Attention does not depend on an order that
    queries and keys share.
    """
    half, rest = rotary_dim // 2, (head_dim - rotary_dim) // 2
    step, offset = (2, 1) if interleaved else (1, half)
    first = [step * i for i in range(half)]
    still = list(range(rotary_dim, head_dim))
    return [*first, *still[:rest], *(i + offset for i in first), *still[rest:]]


def _scale(frequencies: Tensor, scaling: RopeScaling, theta: float, max_positions: int) -> Tensor:
    """Return the frequencies [d/2] as scaled."""
    match scaling.kind:
        case "linear":
            return frequencies / scaling.factor
        case "llama3":
            return _blend_by_turns(frequencies, scaling)
        case "yarn":
            return _blend_by_dimension(frequencies, scaling, theta)
        case "longrope":
            is_long = max_positions > scaling.original_max_positions
            factors = scaling.long_factors if is_long else scaling.short_factors
            return frequencies / torch.tensor(factors, dtype=torch.float64)


def _blend_by_turns(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Return the frequencies divided, except those that turn often in the original context."""
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return blend * frequencies + (1 - blend) * frequencies / scaling.factor


def _blend_by_dimension(frequencies: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """Return the frequencies divided from the pair on that turns seldom (YaRN, section 3.2)."""
    pairs = len(frequencies)

    def pair(turns: float) -> float:
        ratio = scaling.original_max_positions / (turns * 2 * math.pi)
        return pairs * math.log(ratio) / math.log(theta)

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    width = high - low or 0.001
    divided = ((torch.arange(pairs, dtype=torch.float64) - low) / width).clamp(0, 1)
    return frequencies * (1 - divided) + frequencies / scaling.factor * divided

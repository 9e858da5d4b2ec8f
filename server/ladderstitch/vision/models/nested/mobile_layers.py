"""What supernets of mobile blocks have in common: squeeze and excitation."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ladderstitch.vision.models.nested.sizes import TensorSizes, make_divisible
from ladderstitch.vision.models.nested.slices import Slices

REDUCTION = 4


def add_squeeze(sizes: TensorSizes, name: str, channels: int, least: int = 8) -> None:
    """Add the tensors of squeeze and excitation, whose middle has at least `least` channels."""
    middle = make_divisible(channels // REDUCTION, least=least)
    for part, rows, columns in (("reduce", middle, channels), ("expand", channels, middle)):
        sizes.add(f"{name}.{part}.weight", rows, columns, 1, 1)
        sizes.add(f"{name}.{part}.bias", rows)


def squeeze(slices: Slices, name: str, channels: int, least: int = 8) -> Callable[[Tensor], Tensor]:
    """Return squeeze and excitation of maps [B, channels, h, w]."""
    middle = make_divisible(channels // REDUCTION, least=least)
    down = slices.take(f"{name}.reduce.weight", middle, channels).flatten(1)
    up = slices.take(f"{name}.expand.weight", channels, middle).flatten(1)
    down_bias = slices.take(f"{name}.reduce.bias", middle)
    up_bias = slices.take(f"{name}.expand.bias", channels)

    def excite(x: Tensor) -> Tensor:
        pooled = x.mean((2, 3))
        gate = F.linear(F.relu(F.linear(pooled, down, down_bias)), up, up_bias)
        return x * F.hardsigmoid(gate)[:, :, None, None]

    return excite

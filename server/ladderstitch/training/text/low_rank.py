"""What retraining changes of a tensor: a low-rank addition to a matrix (LoRA, arXiv 2106.09685),
a plain one to a vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank(nn.Module):
    """up [N, r] @ down [r, K] beside a matrix [N, K]; of a vector [N], `up` alone.

    It begins as nothing: `up` is zero.
    """

    def __init__(self, shape: Sequence[int], rank: int, random: torch.Generator) -> None:
        super().__init__()
        self.down: nn.Parameter | None = None
        if len(shape) == 1:
            self.up = nn.Parameter(torch.zeros(shape[0]))
            return
        height, width = shape
        self.up = nn.Parameter(torch.zeros(height, rank))
        self.down = nn.Parameter(torch.randn(rank, width, generator=random) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] through the addition: [.., N]."""
        assert self.down is not None, "vectors have no product"
        return F.linear(F.linear(x, self.down), self.up)

    def offset(self) -> Tensor:
        """The addition itself, in the tensor's shape."""
        return self.up if self.down is None else self.up @ self.down


def adapt(
    shapes: Mapping[str, Sequence[int]], layers: Sequence[int], rank: int, seed: int
) -> dict[str, LowRank]:
    """An adapter for every tensor of these layers, by the tensor's name."""
    random = torch.Generator().manual_seed(seed)
    prefixes = tuple(f"model.layers.{layer}." for layer in layers)
    chosen = sorted(name for name in shapes if name.startswith(prefixes))
    return {name: LowRank(shapes[name], rank, random) for name in chosen}


def delta_tensors(adapters: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """As a bundle's delta file holds them, in half precision."""
    tensors = {}
    for name, adapter in adapters.items():
        tensors[f"{name}.up"] = adapter.up.detach().half().contiguous()
        if adapter.down is not None:
            tensors[f"{name}.down"] = adapter.down.detach().half().contiguous()
    return tensors

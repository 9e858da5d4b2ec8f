"""Stitching layers that learn a low-rank update of their least-squares start (SN-Netv2).

y = W x + b + (1 / r) B A x with W fixed; A starts small and random, B at zero, so that training
starts from least squares. Afterwards the update is folded into W.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ladderstitch.errors import ConfigError
from ladderstitch.vision.models.stitched import StitchedModel


class LowRankUpdate(nn.Module):
    """W -> W + B A / r, for matrices and for 1x1 convolutions."""

    def __init__(self, weight: Tensor, rank: int, seed: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape[:2]
        generator = torch.Generator().manual_seed(seed)
        self.rank = rank
        self.lora_A = nn.Parameter(torch.randn(rank, inputs, generator=generator) / inputs**0.5)
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.lora_B @ self.lora_A / self.rank).view_as(weight)


def add_low_rank(model: StitchedModel, rank: int) -> None:
    """Let every stitching layer learn an update and its bias, and nothing else of itself; in place.

    Raises `ConfigError` for a rank that is no saving.
    """
    for number, layer in enumerate(_affines(model)):
        if rank >= min(layer.weight.shape[:2]):
            raise ConfigError(
                f"stitching.low_rank: expected less than {min(layer.weight.shape[:2])}, the "
                f"smaller width of a stitching layer, got {rank}"
            )
        layer.weight.requires_grad_(False)
        parametrize.register_parametrization(
            layer, "weight", LowRankUpdate(layer.weight, rank, seed=number)
        )


def fold_low_rank(model: StitchedModel) -> None:
    """Make the updates part of the matrices again; in place."""
    for layer in _affines(model):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def _affines(model: StitchedModel) -> list[nn.Linear | nn.Conv2d]:
    kinds = nn.Linear | nn.Conv2d
    return [module for module in model.stitch_layers.modules() if isinstance(module, kinds)]

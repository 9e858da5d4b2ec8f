"""Stitching layers: initialisation by least squares on features, low-rank updates (SN-Netv2)."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ladderstitch.errors import ConfigError, DataError
from ladderstitch.vision.models.route import Stitch
from ladderstitch.vision.models.stitched import Backbone, StitchedModel, feature_rows


def solve_affine(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight W [D_end, D_front] and bias b [D_end] that minimise |x W^T + b - y|.

    x is [N, D_front], y is [N, D_end]. The system is solved in float64; of several solutions, the
    one of least norm is returned. Raises `DataError` for features that are not finite, because the
    training of an anchor has diverged.
    """
    if not (x.isfinite().all() and y.isfinite().all()):
        raise DataError(
            "features: expected finite numbers, got NaN or infinity; an anchor's training diverged"
        )
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    design = torch.cat((x.double(), ones), dim=1)  # [N, D_front + 1]
    solution = torch.linalg.lstsq(design, y.double(), driver="gelsd").solution
    return solution[:-1].T.to(x.dtype), solution[-1].to(x.dtype)


def anchor_features(anchor: Backbone, images: Tensor) -> list[Tensor]:
    """Return the features that enter step 0, then those that leave each step.

    Each entry is [N, D], with one row per token, or per pixel of a map.
    """
    with torch.inference_mode():
        x = anchor.embed(images)
        features = [feature_rows(x)]
        for step in anchor.steps():
            x = step(x)
            features.append(feature_rows(x))
    return features


def stitched_pairs(stitches: tuple[Stitch, ...]) -> dict[str, list[tuple[int, int, int, int]]]:
    """Return, per stitching layer, its (front anchor, last front step, end anchor, first step)."""
    pairs: dict[str, list[tuple[int, int, int, int]]] = defaultdict(list)
    for stitch in stitches:
        joints = zip(stitch.segments, stitch.layers, stitch.segments[1:], strict=False)
        for front, layer, end in joints:
            joint = (front.anchor, front.last, end.anchor, end.first)
            if layer is not None and joint not in pairs[layer]:
                pairs[layer].append(joint)
    return dict(pairs)


def initialise_stitching_layers(model: StitchedModel, images: Tensor) -> None:
    """Set every stitching layer to the mean solution of the stitches that share it.

    The features come from the images [B, C, H, W]. For front step j and end step k, x are the
    features that leave j, and y are those that enter k.
    """
    features = [anchor_features(anchor, images) for anchor in model.backbones()]
    for layer, pairs in stitched_pairs(model.stitches).items():
        solutions = [
            solve_affine(features[front][last + 1], features[end][first])
            for front, last, end, first in pairs
        ]
        affine = model.affine(layer)
        weight = torch.stack([weight for weight, _ in solutions]).mean(0)
        bias = torch.stack([bias for _, bias in solutions]).mean(0)
        assert affine.bias is not None
        with torch.no_grad():
            # The weight of a 1x1 convolution has two more dimensions.
            affine.weight.copy_(weight.view_as(affine.weight))
            affine.bias.copy_(bias)


class LowRankUpdate(nn.Module):
    """A parametrisation W + B A / r of rank r, for matrices and for 1x1 convolutions."""

    def __init__(self, weight: Tensor, rank: int, seed: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape[:2]
        generator = torch.Generator().manual_seed(seed)
        self.rank = rank
        self.lora_A = nn.Parameter(torch.randn(rank, inputs, generator=generator) / inputs**0.5)
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the updated weight, in the shape of the original one."""
        return weight + (self.lora_B @ self.lora_A / self.rank).view_as(weight)


def add_low_rank(model: StitchedModel, rank: int) -> None:
    """Make every stitching layer learn only its bias and a low-rank update; in place.

    Raises `ConfigError` for a rank that does not reduce the number of parameters.
    """
    for number, layer in enumerate(_affine_layers(model)):
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
    """Add the updates to the matrices; in place."""
    for layer in _affine_layers(model):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def _affine_layers(model: StitchedModel) -> list[nn.Linear | nn.Conv2d]:
    """Return the affine maps of all stitching layers."""
    kinds = nn.Linear | nn.Conv2d
    return [module for module in model.stitch_layers.modules() if isinstance(module, kinds)]

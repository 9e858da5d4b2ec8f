"""A family from anchors that exist: their weights, and stitching layers from least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ladderstitch.training.vision.least_squares import initialise_stitching_layers
from ladderstitch.vision.models.families import FamilyConfig
from ladderstitch.vision.models.stitched import StitchedModel


def assemble_family(
    config: FamilyConfig, anchors: Sequence[Mapping[str, Tensor]], images: Tensor
) -> StitchedModel:
    """The family in eval mode; `anchors` are state dicts, `images` [B, C, H, W] preprocessed.

    Needs no labels: each stitching layer is fitted to the features of the anchors themselves.
    """
    model: StitchedModel = config.build()
    for trunk, weights in zip(model.trunks(), anchors, strict=True):
        trunk.load_state_dict(dict(weights))
    model.eval().requires_grad_(False)
    with torch.inference_mode():
        initialise_stitching_layers(model, images)
    return model

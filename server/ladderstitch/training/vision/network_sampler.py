"""Which network of a family a training step draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ladderstitch.vision.models.cost import stitch_cost
from ladderstitch.vision.models.stitched import StitchedModel


def groups_by_cost(macs: dict[int, int], step: float) -> list[list[int]]:
    """Ids in order of cost; a new group opens when one costs `step` more than its first.

    Resource-constrained sampling (SN-Netv2, arXiv 2307.00154, section 3.3): cheap and dear networks
    come up as often as the many in between.
    """
    groups: list[list[int]] = []
    first = -float("inf")
    for stitch in sorted(macs, key=lambda stitch: (macs[stitch], stitch)):
        if macs[stitch] > first + step:
            groups.append([])
            first = macs[stitch]
        groups[-1].append(stitch)
    return groups


def sampling_groups(model: StitchedModel, image_size: int, step: float | None) -> list[list[int]]:
    """Usable ids in groups that are drawn alike: all of them, or by cost."""
    usable = [stitch for stitch in model.stitches if stitch.usable]
    if step is None:
        return [[stitch.id for stitch in usable]]
    macs = {stitch.id: stitch_cost(model, stitch, image_size).macs for stitch in usable}
    return groups_by_cost(macs, step)


def draw(groups: Sequence[Sequence[int]], rng: torch.Generator) -> int:
    """A group, then an id in it, both uniformly."""
    group = groups[int(torch.randint(len(groups), (), generator=rng))]
    return group[int(torch.randint(len(group), (), generator=rng))]

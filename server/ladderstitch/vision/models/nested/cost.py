"""Arithmetic cost of a path, counted while it runs without data on torch's meta device."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ladderstitch.vision.models.cost import BATCH_NORM, LAYER_NORM, POOLING, Cost
from ladderstitch.vision.models.nested.model import NestedConfig
from ladderstitch.vision.models.nested.slices import Plan, Slices

aten = torch.ops.aten


def path_costs(config: NestedConfig) -> dict[int, Cost]:
    """Return multiply-accumulates per image and parameters of every path, by its id.

    Elementwise operations count as in `models/cost.py`. What is computed once for a batch, like
    kernels of other kernels, counts nothing: the cost is what a second image adds.
    """
    with torch.device("meta"):
        model = config.build().eval().requires_grad_(False)
        batches = [torch.empty(size, *config.inputs.shape) for size in (1, 2)]
    costs = {}
    for stitch in model.stitches:
        slices = Slices(model)
        plan = model.plan(stitch.id, slices)
        one, two = (_count_flops(plan, images) for images in batches)
        costs[stitch.id] = Cost((two - one) // 2, slices.parameters)
    return costs


def _count_flops(plan: Plan, images: Tensor) -> int:
    """Return the floating-point operations of a batch."""
    counter = FlopCounterMode(display=False, custom_mapping=_ELEMENTWISE)
    with counter, torch.no_grad():
        plan(images)
    return counter.get_total_flops()


def _per_element(operations: int) -> Any:
    """Return a counting rule of an operation that reads each element of its input once."""

    def count(x: Any, *_args: Any, out_shape: Any = None, **_kwargs: Any) -> int:
        return 2 * operations * prod(x)

    return count


_ELEMENTWISE = {
    aten.native_layer_norm: _per_element(LAYER_NORM),
    aten.native_batch_norm: _per_element(BATCH_NORM),
    aten._native_batch_norm_legit_no_training: _per_element(BATCH_NORM),
    aten.cudnn_batch_norm: _per_element(BATCH_NORM),
    aten.avg_pool2d: _per_element(POOLING),
}
"""Counting rules of operations that torch does not count, in floating-point operations."""

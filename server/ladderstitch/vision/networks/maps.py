"""Affine maps between cuts of two networks: layouts of features, and the map as an ONNX graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor

from ladderstitch.vision.models.graphs import INPUT, OUTPUT

MIN_OPSET = 11
"""Version of ONNX's operators from which images can be resized as in torch."""

Layout = Literal["vector", "tokens", "map", "grid"]
"""Features [D], [T, D], [D, h, w] and [h, w, D]; maps and grids of volumes have an axis t first."""


@dataclass(frozen=True, slots=True)
class Features:
    """The layout of the features at a cut: width D, and the sides of their grid or no grid."""

    layout: Layout
    width: int
    rows: int
    grid: tuple[int, ...] | None

    @classmethod
    def of(cls, shape: Sequence[int]) -> Features | None:
        """Return the layout of a shape without the batch; None if it is none that can be mapped.

        Images are channels-last if only their first two axes are equal, and volumes if only the two
        before the last one are.
        """
        if len(shape) == 1:
            return cls("vector", shape[0], 1, None)
        if len(shape) == 2:
            side = math.isqrt(shape[0])
            square = (side, side) if side * side == shape[0] else None
            return cls("tokens", shape[1], shape[0], square)
        if len(shape) not in (3, 4):
            return None
        before, second, last = shape[-3:]
        if before == second != last:
            return cls("grid", last, math.prod(shape[:-1]), tuple(shape[:-1]))
        return cls("map", shape[0], math.prod(shape[1:]), tuple(shape[1:]))

    def can_map_to(self, end: Features) -> bool:
        """Return whether an affine map leads from these features to those at another cut."""
        if self.layout == "vector" or end.layout == "vector":
            return self.layout == end.layout
        same_tokens = self.layout == end.layout == "tokens" and self.rows == end.rows
        if self.grid is None or end.grid is None:
            return same_tokens
        return len(self.grid) == len(end.grid)

    def map_macs(self, end: Features) -> int:
        """Return the multiply-accumulates of the map for one image."""
        return end.rows * self.width * end.width


def aligned_rows(x: NDArray[np.float32], front: Features, end: Features) -> Tensor:
    """Return the rows [B * R, D_front] that the map multiplies, in the grid of the end's features.

    `x` holds front features with the batch first.
    """
    features = torch.from_numpy(x)
    if front.grid is None or end.grid is None or front.grid == end.grid:
        return _as_rows(features, front)
    maps = _as_map(features, front)
    mode = "bilinear" if len(end.grid) == 2 else "trilinear"
    resized = F.interpolate(maps, end.grid, mode=mode, align_corners=False)
    return resized.movedim(1, -1).reshape(-1, front.width)


def feature_rows(y: NDArray[np.float32], end: Features) -> Tensor:
    """Return features with the batch first as rows [B * R, D]."""
    return _as_rows(torch.from_numpy(y), end)


def _as_rows(x: Tensor, features: Features) -> Tensor:
    if features.layout == "map":
        x = x.movedim(1, -1)
    return x.reshape(-1, features.width)


def _as_map(x: Tensor, features: Features) -> Tensor:
    assert features.grid is not None
    if features.layout == "map":
        return x
    return x.reshape(len(x), *features.grid, features.width).movedim(-1, 1)


def map_graph(
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    front: Features,
    end: Features,
    like: onnx.ModelProto,
) -> onnx.ModelProto:
    """Return the map as a graph from `x` to `y`, with the operator versions of the model `like`.

    `weight` is [D_end, D_front], `bias` is [D_end].
    """
    builder = _Builder()
    if front.layout != "map" and front.grid == end.grid:
        builder.add("MatMul", builder.constant("weight", np.ascontiguousarray(weight.T)))
        builder.add("Add", builder.constant("bias", bias))
        current = front
    else:
        builder.to_map(front)
        if front.grid != end.grid:
            builder.resize(end.grid)
        kernel_shape = (*weight.shape, *(1 for _ in end.grid or ()))
        kernel = builder.constant("weight", weight.reshape(kernel_shape))
        builder.add("Conv", kernel, builder.constant("bias", bias))
        current = Features("map", end.width, end.rows, end.grid)
    builder.to_layout(current, end)
    graph = builder.finish()
    return helper.make_model(graph, opset_imports=like.opset_import, ir_version=like.ir_version)


class _Builder:
    """A chain of operators from `x` to `y`."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.last = INPUT

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        """Add a weight, and return its name, which is `name` and a number."""
        name = f"{name}-{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def add(self, operator: str, *inputs: str, **attributes: Any) -> None:
        """Apply an operator to the last tensor."""
        name = f"step-{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, [self.last, *inputs], [name], **attributes))
        self.last = name

    def reshape(self, *shape: int) -> None:
        """Reshape everything after the batch."""
        self.add("Reshape", self.constant("shape", np.asarray((0, *shape), np.int64)))

    def to_map(self, front: Features) -> None:
        """Turn tokens or a grid into a map."""
        if front.layout == "grid":
            assert front.grid is not None
            axes = range(1, len(front.grid) + 1)
            self.add("Transpose", perm=[0, len(axes) + 1, *axes])
        elif front.layout == "tokens":
            assert front.grid is not None
            self.add("Transpose", perm=[0, 2, 1])
            self.reshape(front.width, *front.grid)

    def resize(self, grid: tuple[int, ...] | None) -> None:
        """Resize a map by linear interpolation along each axis."""
        assert grid is not None
        unused = self.constant("none", np.zeros(0, np.float32))
        shape = f"shape-of-{self.last}"
        self.nodes.append(helper.make_node("Shape", [self.last], [shape]))
        zero, two = (self.constant("index", np.asarray([i], np.int64)) for i in (0, 2))
        kept, sizes = f"{shape}-kept", f"{shape}-resized"
        self.nodes.append(helper.make_node("Slice", [shape, zero, two], [kept]))
        target = self.constant("grid", np.asarray(grid, np.int64))
        self.nodes.append(helper.make_node("Concat", [kept, target], [sizes], axis=0))
        self.add("Resize", unused, unused, sizes, mode="linear")

    def to_layout(self, current: Features, end: Features) -> None:
        """Turn features of the end's grid and width into the layout of the end."""
        assert end.layout == "vector" or current.rows == end.rows
        if current.layout == end.layout:
            return
        if current.layout != "map":  # channels last: tokens or a grid
            if end.layout == "map":
                self.to_map(Features(current.layout, end.width, end.rows, end.grid))
            else:
                self.reshape(
                    *((end.grid or ()) if end.layout == "grid" else (end.rows,)), end.width
                )
        elif end.layout == "grid":
            assert end.grid is not None
            self.add("Transpose", perm=[0, *range(2, len(end.grid) + 2), 1])
        else:
            self.reshape(end.width, end.rows)
            self.add("Transpose", perm=[0, 2, 1])

    def finish(self) -> onnx.GraphProto:
        """Return the graph from `x` to `y`."""
        self.nodes.append(helper.make_node("Identity", [self.last], [OUTPUT]))
        x, y = (
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            for name in (INPUT, OUTPUT)
        )
        return helper.make_graph(self.nodes, "map", [x], [y], self.weights)

"""Arithmetic and parameters of the nodes of an ONNX network."""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx

from ladderstitch.vision.networks.order import DataFlow

PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators whose multiply-accumulates are counted."""


def tensors_of_products(flow: DataFlow) -> list[str]:
    """Return the tensors whose shapes give the arithmetic of the live nodes."""
    return [
        name
        for number, node in enumerate(flow.nodes)
        if node.op_type in PRODUCTS and flow.is_live(number)
        for name in (*node.input[:2], node.output[0])
        if name not in flow.weights
    ]


def _count_macs(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the multiply-accumulates of a node for a batch."""
    if node.op_type not in PRODUCTS:
        return 0
    left, right, out = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    if node.op_type == "Conv":
        macs = math.prod(out) * math.prod(right[1:])
    elif node.op_type == "ConvTranspose":
        macs = math.prod(left) * math.prod(right[1:])
    else:
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        macs = math.prod(out) * left[0 if transposed else -1]
    return macs


def count_costs(
    flow: DataFlow,
    graph: onnx.GraphProto,
    probed: Mapping[str, tuple[int, ...]],
    batch: int,
) -> tuple[list[int], list[int]]:
    """Return the MACs of each node, and the number of parameters used up to each node."""
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    shapes = weights | dict(probed)
    macs, parameters = [], []
    seen: set[str] = set()
    total = 0
    for number, node in enumerate(flow.nodes):
        macs.append(_count_macs(node, shapes) // batch if flow.is_live(number) else 0)
        new = {name for name in flow.inputs[number] if name in weights} - seen
        seen |= new
        total += sum(math.prod(weights[name]) for name in new)
        parameters.append(total)
    return macs, parameters

"""Sizes of tensors before a network is run: inferred from its operators and small weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from ladderstitch.errors import BundleError
from ladderstitch.runtime.sessions import ERRORS_ONLY
from ladderstitch.vision.networks.order import DataFlow, network_inputs
from ladderstitch.vision.networks.reader import MAX_ELEMENTS

SMALL = 1024
"""Elements up to which a tensor may be the size of another one."""
SIZE_INPUTS: Mapping[str, int] = {
    "ConstantOfShape": 0,
    "Range": 0,
    "Expand": 1,
    "Tile": 1,
    "Pad": 1,
    "Resize": 1,
    "Upsample": 1,
    "OneHot": 1,
}
"""Operators whose output may be far larger than their inputs; their inputs from here on say how."""


def check_tensor_sizes(model: onnx.ModelProto, batch: int, path: Path) -> None:
    """Raise `BundleError` if a tensor is larger than those of any network for `batch` images.

    Sizes that inference does not follow, because floating-point numbers lead to them, are computed
    first; the weights and operators that they come from are small. A constant size that cannot be
    computed in this way is rejected.
    """
    skeleton = _without_large_weights(model, batch)
    shapes = _infer(skeleton, path)
    values = _compute_sizes(skeleton, shapes, path)
    if values:
        for node in skeleton.graph.node:
            if len(node.output) == 1 and (name := node.output[0]) in values:
                tensor = numpy_helper.from_array(values[name])
                node.CopyFrom(helper.make_node("Constant", [], [name], value=tensor))
        _infer(skeleton, path)


def _without_large_weights(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Return a copy for one batch size in which large weights are inputs of their shape."""
    skeleton = onnx.ModelProto(ir_version=model.ir_version)
    skeleton.opset_import.extend(model.opset_import)
    graph = skeleton.graph
    graph.node.extend(model.graph.node)
    graph.input.extend(network_inputs(model.graph))
    graph.output.extend(model.graph.output)
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= SMALL:
            graph.initializer.append(tensor)
        else:
            info = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            graph.input.append(info)
    return skeleton


def _infer(skeleton: onnx.ModelProto, path: Path) -> dict[str, tuple[int, ...]]:
    """Return the known shapes by name; raises `BundleError` if one is too large."""
    try:
        graph = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    except Exception as error:  # the classes of its errors are not public
        raise BundleError(f"{path}: expected shapes that fit: {error}") from error
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        dims = [dim.dim_value for dim in kind.shape.dim]
        if min(dims, default=0) < 0 or math.prod(dim for dim in dims if dim) > MAX_ELEMENTS:
            name = value.name[:80]
            raise BundleError(
                f"{path}: tensor {name!r}: expected at most {MAX_ELEMENTS} elements, got {dims}"
            )
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim):
            shapes[value.name] = tuple(dims)
    return shapes


def _compute_sizes(
    skeleton: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]], path: Path
) -> dict[str, np.ndarray]:
    """Return the values of computed sizes whose operators have outputs of unknown shape."""
    flow = DataFlow(skeleton.graph)
    values: dict[str, np.ndarray] = {}
    for node in flow.nodes:
        start = SIZE_INPUTS.get(node.op_type)
        if start is None or node.output[0] in shapes:
            continue
        for name in node.input[start:]:
            if name in flow.writer and name not in flow.live and name not in values:
                value = _evaluate(name, flow, skeleton, shapes)
                if value is not None:
                    values[name] = value
                elif name not in flow.shape_values:
                    raise BundleError(
                        f"{path}: tensor {node.output[0][:80]!r}: expected a size that is known "
                        "before the network is run"
                    )
    return values


def _evaluate(
    name: str, flow: DataFlow, skeleton: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]
) -> np.ndarray | None:
    """Return a tensor that no pixel leads to, or None unless all tensors before it are small."""
    weights = {tensor.name: tensor for tensor in skeleton.graph.initializer}
    chosen: dict[int, onnx.NodeProto] = {}
    used, pending = set(), [name]
    while pending:
        current = pending.pop()
        number = flow.writer.get(current)
        if number is None:
            if current not in weights:
                return None
            used.add(current)
        elif number not in chosen:
            node = _as_constant(flow.nodes[number], shapes)
            if not _is_small(node, shapes) and (current != name or node.op_type in SIZE_INPUTS):
                return None
            chosen[number] = node
            pending += node.input
    nodes = [chosen[number] for number in sorted(chosen)]
    output = [onnx.ValueInfoProto(name=name)]
    graph = helper.make_graph(nodes, "size", [], output, [weights[n] for n in sorted(used)])
    return _run(
        helper.make_model(
            graph, opset_imports=skeleton.opset_import, ir_version=skeleton.ir_version
        )
    )


def _as_constant(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> onnx.NodeProto:
    """Return a constant instead of the shape of a tensor whose shape is known, or the node."""
    if node.op_type != "Shape" or node.attribute or node.input[0] not in shapes:
        return node
    value = numpy_helper.from_array(np.asarray(shapes[node.input[0]], np.int64))
    return helper.make_node("Constant", [], list(node.output), value=value)


def _is_small(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    sizes = [math.prod(shapes.get(name, (SMALL + 1,))) for name in node.output if name]
    return max(sizes, default=0) <= SMALL


def _run(model: onnx.ModelProto) -> np.ndarray | None:
    """Return the output of a graph without inputs; None if it does not run."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY + 1
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return np.asarray(session.run(None, {})[0])
    except Exception:  # the errors of ONNX Runtime have no common class
        return None

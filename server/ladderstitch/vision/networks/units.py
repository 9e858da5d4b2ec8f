"""Units of a network: the parts between cuts, as ONNX graphs from `x` to `y`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.compose import add_prefix

from ladderstitch.errors import BundleError
from ladderstitch.vision.models.graphs import INPUT, OUTPUT
from ladderstitch.vision.networks.order import SHAPE_OPERATORS, DataFlow
from ladderstitch.vision.networks.probe import NetworkInfo, fix_size, probe
from ladderstitch.vision.networks.reader import read_network

PREFIX = "network/"
"""Prefix of the names of a unit's own tensors, so that none is `x` or `y`."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """An affine change of images per channel: x times `factor` plus `shift`."""

    factor: tuple[float, ...]
    shift: tuple[float, ...]


class Network:
    """A network for images of one size [C, H, W], and its parts between cuts."""

    def __init__(self, path: Path, image_shape: Sequence[int]) -> None:
        """Read, check and probe the network in an ONNX file.

        Raises `BundleError` if it cannot be read or run, or has not one input and one output.
        """
        self.path = path
        self.model = read_network(path)
        check_interface(self.model, path, image_shape)
        fix_size(self.model, image_shape)
        self.info: NetworkInfo = probe(self.model, path)
        self.flow = DataFlow(self.model.graph)
        self._weights = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.cuts = {cut.name: cut for cut in self.info.cuts}

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators."""
        return max(e.version for e in self.model.opset_import if e.domain in ("", "ai.onnx"))

    def unit(self, start: str | None, end: str | None, scaling: Scaling | None) -> onnx.ModelProto:
        """Return the part between two cuts; None stands for the images and for the output.

        `scaling` is applied to images. Raises `BundleError` for cuts that the network does not
        have, or that are not in order.
        """
        for name in (start, end):
            if name is not None and name not in self.cuts:
                raise BundleError(f"{self.path}: expected the name of a cut, got {name[:80]!r}")
        source, target = start or self.flow.images[0], end or self.flow.outputs[0]
        first = self.flow.writer[start] + 1 if start is not None else 0
        if first > self.flow.writer[target]:
            raise BundleError(f"{self.path}: expected cut {source[:80]!r} before {target[:80]!r}")
        parts = _Extraction(self, source, first, self.flow.writer[target])
        graph = helper.make_graph(
            parts.nodes,
            "unit",
            [onnx.ValueInfoProto(name=source)],
            [onnx.ValueInfoProto(name=target)],
            [self._weights[name] for name in sorted(parts.names & self._weights.keys())],
        )
        inner = self._wrap(graph)
        inner = add_prefix(inner, PREFIX)
        shape = self.info.inputs[source] if start is None else self.cuts[source].shape
        _connect(inner.graph, source, target, shape, scaling)
        if end is None:
            _flatten_output(inner.graph, self.info.outputs[target])
        return inner

    def with_outputs(self, names: Sequence[str]) -> onnx.ModelProto:
        """Return the whole network with these tensors as its outputs."""
        whole = onnx.ModelProto()
        whole.CopyFrom(self.model)
        del whole.graph.output[:]
        whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        return whole

    def _wrap(self, graph: onnx.GraphProto) -> onnx.ModelProto:
        return helper.make_model(
            graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version
        )


def check_interface(model: onnx.ModelProto, path: Path, image_shape: Sequence[int]) -> None:
    """Raise `BundleError` unless a model maps float32 images of this shape to one tensor."""
    weights = {tensor.name for tensor in model.graph.initializer}
    images = [value for value in model.graph.input if value.name not in weights]
    if len(images) != 1:
        raise BundleError(f"{path}: expected one input, got {len(images)}: {_names(images)}")
    kind = images[0].type.tensor_type
    dims = [dim.dim_value for dim in kind.shape.dim]
    if kind.elem_type != onnx.TensorProto.FLOAT:
        name = onnx.TensorProto.DataType.Name(kind.elem_type)
        raise BundleError(f"{path}: expected a float32 input, got {name}")
    fits = len(dims) == 4 and all(
        got in (0, size) for got, size in zip(dims[1:], image_shape, strict=True)
    )
    if not fits:
        raise BundleError(
            f"{path}: expected an input of images [batch, {', '.join(map(str, image_shape))}], "
            f"got {dims} (0: any)"
        )
    if len(model.graph.output) != 1:
        raise BundleError(
            f"{path}: expected one output, class scores [batch, classes], got "
            f"{len(model.graph.output)}: {_names(model.graph.output)}; networks with several "
            "outputs can be inspected and not served"
        )


def _names(values: Sequence[onnx.ValueInfoProto]) -> str:
    return ", ".join(value.name[:80] for value in values[:10])


class _Extraction:
    """The nodes of one unit, in order: its live nodes and what they need besides its input."""

    def __init__(self, network: Network, source: str, first: int, last: int) -> None:
        self._network, self._flow = network, network.flow
        live = [n for n in range(first, last + 1) if self._flow.is_live(n)]
        self._available = {source}.union(*(self._flow.nodes[n].output for n in live))
        self._source = source
        chosen: dict[int, list[onnx.NodeProto]] = {n: [self._flow.nodes[n]] for n in live}
        self.names: set[str] = set()
        pending = [name for n in live for name in self._flow.inputs[n]]
        while pending:
            name = pending.pop()
            if name in self.names:
                continue
            self.names.add(name)
            number = self._flow.writer.get(name)
            if number is None or number in chosen or name in self._available:
                continue
            chosen[number] = self._choose(number)
            pending += self._flow.inputs[number] if len(chosen[number]) == 1 else []
        self.nodes = [node for number in sorted(chosen) for node in chosen[number]]

    def _choose(self, number: int) -> list[onnx.NodeProto]:
        """Return a node, or the nodes that compute its shape value from the batch size."""
        node = self._flow.nodes[number]
        if node.op_type not in SHAPE_OPERATORS:
            return [node]
        if not self._flow.live.intersection(node.input) or node.input[0] in self._available:
            return [node]
        name = node.output[0]
        if name not in self._network.info.shape_values:
            raise BundleError(
                f"{self._network.path}: shape value {name[:80]!r} does not grow with the batch"
            )
        offset, slope = self._network.info.shape_values[name]
        inner = [
            f"{name}/{part}" for part in ("shape", "axis", "batch", "slope", "grown", "offset")
        ]
        shape, axis, batch, slope_name, grown, offset_name = inner
        return [
            helper.make_node("Shape", [self._source], [shape]),
            _constant(axis, np.asarray(0, np.int64)),
            helper.make_node("Gather", [shape, axis], [batch]),
            _constant(slope_name, slope),
            helper.make_node("Mul", [batch, slope_name], [grown]),
            _constant(offset_name, offset),
            helper.make_node("Add", [grown, offset_name], [name]),
        ]


def _constant(name: str, value: np.ndarray) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))


def _connect(
    graph: onnx.GraphProto,
    source: str,
    target: str,
    shape: Sequence[int],
    scaling: Scaling | None,
) -> None:
    """Let the graph read `x` instead of `source`, and write `y` instead of `target`."""
    source, target = PREFIX + source, PREFIX + target
    before = [helper.make_node("Identity", [INPUT], [source])]
    if scaling is not None:
        names = ["scaling/factor", "scaling/scaled", "scaling/shift"]
        values = [np.asarray(v, np.float32) for v in (scaling.factor, scaling.shift)]
        before = [
            _constant(names[0], values[0].reshape(1, -1, 1, 1)),
            helper.make_node("Mul", [INPUT, names[0]], [names[1]]),
            _constant(names[2], values[1].reshape(1, -1, 1, 1)),
            helper.make_node("Add", [names[1], names[2]], [source]),
        ]
    for node in reversed(before):
        graph.node.insert(0, node)
    graph.node.append(helper.make_node("Identity", [target], [OUTPUT]))
    kind = onnx.TensorProto.FLOAT
    del graph.input[:], graph.output[:]
    graph.input.append(helper.make_tensor_value_info(INPUT, kind, ["batch", *shape]))
    graph.output.append(helper.make_tensor_value_info(OUTPUT, kind, None))


def _flatten_output(graph: onnx.GraphProto, shape: Sequence[int]) -> None:
    """Turn class scores [B, K, 1, 1] into [B, K]."""
    if len(shape) > 1:
        last = graph.node[-1]
        last.CopyFrom(helper.make_node("Flatten", list(last.input), [OUTPUT], axis=1))

"""Units of a network: the parts between cuts, as ONNX graphs from `x` to `y`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.compose import add_prefix

from ladderstitch.errors import BundleError
from ladderstitch.vision.models.graphs import INPUT, OUTPUT
from ladderstitch.vision.networks.order import SHAPE_OPERATORS, DataFlow
from ladderstitch.vision.networks.outputs import SERVED_TYPES, join_outputs
from ladderstitch.vision.networks.probe import NetworkInfo, fix_size, probe
from ladderstitch.vision.networks.reader import read_network
from ladderstitch.vision.networks.scaling import Scaling

PREFIX = "network/"
"""Prefix of the names of a unit's own tensors, so that none is `x` or `y`."""


class Network:
    """A network for inputs of one shape, such as images [C, H, W], and its parts between cuts."""

    def __init__(self, path: Path, image_shape: Sequence[int]) -> None:
        """Read, check and probe the network in an ONNX file.

        Raises `BundleError` if it cannot be read or run, has not one input, or has an output
        without the batch as its first axis.
        """
        self.path = path
        self.model = read_network(path)
        check_interface(self.model, path, image_shape)
        fix_size(self.model, image_shape)
        self.info: NetworkInfo = probe(self.model, path)
        self.flow = DataFlow(self.model.graph)
        check_outputs(self.info, self.flow, path)
        self._weights = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.cuts = {cut.name: cut for cut in self.info.cuts}

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators."""
        return max(e.version for e in self.model.opset_import if e.domain in ("", "ai.onnx"))

    def unit(
        self,
        start: str | None,
        end: str | None,
        scaling: Scaling | None,
        outputs: Sequence[str] = (),
    ) -> onnx.ModelProto:
        """Return the part between two cuts; None stands for the images and for the outputs.

        `scaling` is applied to images. The end of a network that classifies is its scores
        [batch, classes]; with the names of `outputs` it is their rows. Raises `BundleError` for
        cuts that the network does not have, or that are not in order.
        """
        for name in (start, end):
            if name is not None and name not in self.cuts:
                raise BundleError(f"{self.path}: expected the name of a cut, got {name[:80]!r}")
        source = start or self.flow.images[0]
        targets = [end] if end is not None else list(outputs or self.flow.outputs[:1])
        first = self.flow.writer[start] + 1 if start is not None else 0
        last = max(self.flow.writer[target] for target in targets)
        if first > last:
            raise BundleError(
                f"{self.path}: expected cut {source[:80]!r} before {targets[0][:80]!r}"
            )
        parts = _Extraction(self, source, first, last)
        graph = helper.make_graph(
            parts.nodes,
            "unit",
            [onnx.ValueInfoProto(name=source)],
            [onnx.ValueInfoProto(name=target) for target in targets],
            [self._weights[name] for name in sorted(parts.names & self._weights.keys())],
        )
        inner = self._wrap(graph)
        inner = add_prefix(inner, PREFIX)
        shape = self.info.inputs[source] if start is None else self.cuts[source].shape
        _connect_input(inner.graph, source, shape, scaling, self.opset)
        names = [PREFIX + target for target in targets]
        if end is None and outputs:
            join_outputs(inner.graph, names, OUTPUT)
        elif end is None and len(self.info.outputs[targets[0]]) > 1:  # [B, K, 1, 1] to [B, K]
            inner.graph.node.append(helper.make_node("Flatten", names, [OUTPUT], axis=1))
        else:
            inner.graph.node.append(helper.make_node("Identity", names, [OUTPUT]))
        del inner.graph.output[:]
        float32 = onnx.TensorProto.FLOAT
        inner.graph.output.append(helper.make_tensor_value_info(OUTPUT, float32, None))
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
    """Raise `BundleError` unless a model takes one float32 tensor of this shape, batch first."""
    weights = {tensor.name for tensor in model.graph.initializer}
    images = [value for value in model.graph.input if value.name not in weights]
    if len(images) != 1:
        raise BundleError(f"{path}: expected one input, got {len(images)}: {_names(images)}")
    kind = images[0].type.tensor_type
    dims = [dim.dim_value for dim in kind.shape.dim]
    if kind.elem_type != onnx.TensorProto.FLOAT:
        name = onnx.TensorProto.DataType.Name(kind.elem_type)
        raise BundleError(f"{path}: expected a float32 input, got {name}")
    fits = len(dims) == len(image_shape) + 1 and all(
        got in (0, size) for got, size in zip(dims[1:], image_shape, strict=True)
    )
    if not fits:
        raise BundleError(
            f"{path}: expected an input [batch, {', '.join(map(str, image_shape))}], got {dims} "
            "(0: any)"
        )


def check_outputs(info: NetworkInfo, flow: DataFlow, path: Path) -> None:
    """Raise `BundleError` for an output that cannot be returned for each image of a batch."""
    for name, kind in info.output_types.items():
        where = f"{path}: output {name[:80]!r}"
        if kind not in SERVED_TYPES:
            raise BundleError(f"{where}: expected numbers, got {kind}")
        if name not in flow.live or name not in flow.writer:
            raise BundleError(
                f"{where}: expected a tensor that the network computes from its input"
            )
        if name not in info.outputs:
            raise BundleError(
                f"{where}: expected the batch as the first axis, and sizes that do not depend on "
                "the images or on the batch"
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


def _connect_input(
    graph: onnx.GraphProto,
    source: str,
    shape: Sequence[int],
    scaling: Scaling | None,
    opset: int,
) -> None:
    """Let the graph read `x` instead of `source`."""
    source = PREFIX + source
    sides: list[int | str] = [*shape[1:]]
    if scaling is not None and (scaling.box or scaling.size):
        sides = ["height", "width"]
    before = [helper.make_node("Identity", [INPUT], [source])]
    if scaling is not None:
        before = scaling.nodes(INPUT, source, opset)
    for node in reversed(before):
        graph.node.insert(0, node)
    del graph.input[:]
    kind = onnx.TensorProto.FLOAT
    graph.input.append(helper.make_tensor_value_info(INPUT, kind, ["batch", *shape[:1], *sides]))

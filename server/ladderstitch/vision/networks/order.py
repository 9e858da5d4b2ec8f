"""The data flow of an ONNX graph: order, what reaches an output, what depends on the images.

There are three kinds of tensors. A *constant* depends on weights only. A *shape value* depends
on the shape of the images only, not on their pixels. Everything else is *live*.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import onnx

from ladderstitch.errors import BundleError

SHAPE_OPERATORS = frozenset({"Shape", "Size"})
RANDOM_OPERATORS = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial"}
    | {"Bernoulli"}
)


def inputs_of(node: onnx.NodeProto) -> list[str]:
    """Return the names of the tensors that a node reads, those read by its subgraphs included."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            names += _outer_names(graph)
    return names


def _outer_names(graph: onnx.GraphProto) -> list[str]:
    """Return the names that a subgraph takes from the graph around it."""
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    own.update(name for node in graph.node for name in node.output)
    used = [name for node in graph.node for name in inputs_of(node)]
    used += [value.name for value in graph.output]
    return [name for name in used if name and name not in own]


def network_inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """Return the inputs that are not weights."""
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def sort_nodes(graph: onnx.GraphProto, path: Path) -> None:
    """Put the nodes into topological order, in place.

    Raises `BundleError` for a cycle, a tensor that two nodes write and one that no node writes.
    """
    known = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    known.update(tensor.values.name for tensor in graph.sparse_initializer)
    writer: dict[str, int] = {}
    for number, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if name in writer or name in known:
                raise BundleError(f"{path}: expected one writer of tensor {name[:80]!r}, got two")
            writer[name] = number
    waiting: dict[int, int] = {}
    readers: dict[int, list[int]] = defaultdict(list)
    for number, node in enumerate(graph.node):
        needed = set(inputs_of(node)) - known
        if missing := needed - writer.keys():
            raise BundleError(f"{path}: no operator writes tensor {min(missing)[:80]!r}")
        waiting[number] = len({writer[name] for name in needed})
        for before in {writer[name] for name in needed}:
            readers[before].append(number)
    order = _drain(waiting, readers)
    if len(order) < len(graph.node):
        raise BundleError(f"{path}: expected a graph without cycles, got a cycle")
    _check_outputs(graph, known | writer.keys(), path)
    if order != list(range(len(order))):
        nodes = [graph.node[number] for number in order]
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)


def _drain(waiting: dict[int, int], readers: dict[int, list[int]]) -> list[int]:
    """Return the nodes in an order in which each follows the nodes that it waits for."""
    if all(reader > number for number, after in readers.items() for reader in after):
        return sorted(waiting)
    ready = [number for number, count in reversed(waiting.items()) if not count]
    order = []
    while ready:
        order.append(ready.pop())
        for reader in readers[order[-1]]:
            waiting[reader] -= 1
            if not waiting[reader]:
                ready.append(reader)
    return order


def _check_outputs(graph: onnx.GraphProto, known: Iterable[str], path: Path) -> None:
    """Raise `BundleError` for an output of the graph that nothing writes."""
    if missing := {value.name for value in graph.output} - set(known):
        raise BundleError(f"{path}: no operator writes output {min(missing)[:80]!r}")


def prune_nodes(graph: onnx.GraphProto) -> None:
    """Remove the nodes and weights that no output needs, in place; the nodes are in order."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(inputs_of(node))
    if len(kept) < len(graph.node):
        copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in reversed(kept)]
        del graph.node[:]
        graph.node.extend(copies)
    for number in reversed(range(len(graph.initializer))):
        if graph.initializer[number].name not in needed:
            del graph.initializer[number]


class DataFlow:
    """Which tensors of a sorted graph are live, and where all of them pass through one tensor."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list(graph.node)
        self.inputs = [inputs_of(node) for node in self.nodes]
        self.weights = {tensor.name for tensor in graph.initializer}
        self.weights.update(tensor.values.name for tensor in graph.sparse_initializer)
        self.images = [value.name for value in network_inputs(graph)]
        self.outputs = [value.name for value in graph.output]
        self.writer = {
            name: number for number, node in enumerate(self.nodes) for name in node.output if name
        }
        self.shape_values: set[str] = set()
        """Tensors that depend on the shape of the images and not on their pixels."""
        self.live = set(self.images)
        self._mark()

    def _mark(self) -> None:
        """Sort the tensors into live ones, shape values and constants."""
        for node, names in zip(self.nodes, self.inputs, strict=True):
            written = [name for name in node.output if name]
            if node.op_type in SHAPE_OPERATORS and self.live.intersection(names):
                self.shape_values.update(written)
            elif self.live.intersection(names) or node.op_type in RANDOM_OPERATORS:
                self.live.update(written)
            elif self.shape_values.intersection(names):
                self.shape_values.update(written)

    def is_live(self, number: int) -> bool:
        """Return whether a node computes something from the pixels of the images."""
        return bool(self.live.intersection(self.nodes[number].output))

    def cuts(self) -> list[str]:
        """Return the tensors through which every path from the images to the outputs runs.

        They are in order, without the images and the outputs themselves. After each live node, the
        scan keeps the live tensors that a later live node reads; if one is left, it is a cut.
        """
        last_use: dict[str, int] = dict.fromkeys(self.outputs, len(self.nodes))
        for number, names in enumerate(self.inputs):
            if self.is_live(number):
                for name in self.live.intersection(names):
                    last_use[name] = max(last_use.get(name, 0), number)
        open_tensors = set(self.images)
        found = []
        for number, node in enumerate(self.nodes):
            if not self.is_live(number):
                continue
            open_tensors.update(name for name in node.output if last_use.get(name, -1) > number)
            open_tensors = {name for name in open_tensors if last_use.get(name, -1) > number}
            if len(open_tensors) == 1 and (cut := next(iter(open_tensors))) in node.output:
                found.append(cut)
        return [name for name in found if name not in self.outputs and name not in self.images]

"""Read an ONNX file from an unknown source: bounded, confined to its folder, in order.

Nothing of the file is run here. `read_network` returns one self-contained model without functions,
whose nodes are in topological order and all lead to an output.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from onnx.inliner import inline_local_functions

from ladderstitch.errors import BundleError
from ladderstitch.vision.networks.order import prune_nodes, sort_nodes

MAX_BYTES = (1 << 31) - (1 << 20)
"""Size of a model with its weights; a protobuf message cannot be larger than 2 GiB."""
MAX_NODES = 100_000
"""Nodes of a model, those of its subgraphs and of the calls of its functions included."""
MAX_RANK = 16
"""Dimensions of a tensor."""
MAX_ELEMENTS = 1 << 30
"""Elements of any tensor for a batch of two images."""
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
"""Sets of operators that ONNX Runtime has without libraries of the user."""
ITEM_BYTES: dict[int, int] = {
    onnx.TensorProto.FLOAT: 4,
    onnx.TensorProto.UINT8: 1,
    onnx.TensorProto.INT8: 1,
    onnx.TensorProto.UINT16: 2,
    onnx.TensorProto.INT16: 2,
    onnx.TensorProto.INT32: 4,
    onnx.TensorProto.INT64: 8,
    onnx.TensorProto.BOOL: 1,
    onnx.TensorProto.FLOAT16: 2,
    onnx.TensorProto.DOUBLE: 8,
    onnx.TensorProto.UINT32: 4,
    onnx.TensorProto.UINT64: 8,
    onnx.TensorProto.BFLOAT16: 2,
}
"""Bytes of one element by the type of a tensor; a weight of another type is rejected."""
TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def read_network(path: Path) -> onnx.ModelProto:
    """Return the model in an ONNX file, with the weights that it keeps in files next to it.

    Raises `BundleError` if the file is not an ONNX model, names data outside its folder, has a
    cycle or sizes that no network has, or needs operators that ONNX Runtime lacks.
    """
    model = _parse(path)
    _check_size_and_operators(model, path)
    weights = list(_tensors_of(model))
    _check_weights(weights, path)
    for tensor in weights:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _load_external(tensor, path)
    if model.functions:
        model = inline_local_functions(model)
    _check_declared_shapes(model.graph, path)
    sort_nodes(model.graph, path)
    prune_nodes(model.graph)
    return model


def _parse(path: Path) -> onnx.ModelProto:
    """Return the message in a file; raises `BundleError` unless it is a model with nodes."""
    model = onnx.ModelProto()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe would wait
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BundleError(f"{path}: expected a regular file")
            if status.st_size > MAX_BYTES:
                raise BundleError(f"{path}: expected at most {MAX_BYTES} bytes, got more")
            data = file.read()
    except OSError as error:
        raise BundleError(f"{path}: {error}") from error
    try:
        model.ParseFromString(data)
    except Exception as error:  # a class of protobuf's, which only protocols may import
        raise BundleError(f"{path}: expected an ONNX model: {error}") from error
    if not model.opset_import or not model.graph.node or not model.graph.output:
        raise BundleError(f"{path}: expected an ONNX model, got a file without operators")
    return model


def _check_size_and_operators(model: onnx.ModelProto, path: Path) -> None:
    """Raise `BundleError` for too many nodes after inlining, and for operators of other domains."""
    sizes: dict[tuple[str, str], int] = {}

    def size_of(nodes: Iterator[onnx.NodeProto], open_calls: tuple[tuple[str, str], ...]) -> int:
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type)
            if key in open_calls:
                raise BundleError(f"{path}: expected functions without recursion, got {key[1]!r}")
            if key in functions and key not in sizes:
                inner = _nodes_of(functions[key].node)
                sizes[key] = size_of(inner, (*open_calls, key))
            elif key not in functions and node.domain not in DOMAINS:
                raise BundleError(
                    f"{path}: expected operators of ONNX Runtime, got {node.op_type[:80]!r} of "
                    f"{node.domain[:80]!r}"
                )
            total += sizes.get(key, 1)
            if total > MAX_NODES:
                raise BundleError(f"{path}: expected at most {MAX_NODES} nodes, got more")
        return total

    functions = {(f.domain, f.name): f for f in model.functions}
    if len(functions) > 1000:
        raise BundleError(f"{path}: expected at most 1000 functions, got {len(functions)}")
    size_of(_nodes_of(model.graph.node), ())


def _nodes_of(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield nodes with those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes_of(graph.node)


def _tensors_of(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every weight of a model: of its graph, its nodes, subgraphs and functions."""
    graphs = [model.graph]
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes.extend(graph.node if graph is not model.graph else ())
            continue
        for attribute in nodes.pop().attribute:
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("g"):
                graphs.append(attribute.g)
            graphs.extend(attribute.graphs)


def _check_weights(tensors: list[onnx.TensorProto], path: Path) -> None:
    """Raise `BundleError` unless each weight has the bytes of its shape, and all fit together."""
    total = 0
    for tensor in tensors:
        where = f"{path}: weight {tensor.name[:80]!r}"
        if tensor.data_type == onnx.TensorProto.STRING:
            continue
        if tensor.data_type not in ITEM_BYTES:
            raise BundleError(f"{where}: expected numbers, got type {tensor.data_type}")
        if len(tensor.dims) > MAX_RANK or any(dim < 0 for dim in tensor.dims):
            raise BundleError(f"{where}: expected a shape, got {list(tensor.dims)[:MAX_RANK]}")
        elements = math.prod(tensor.dims)
        num_bytes = elements * ITEM_BYTES[tensor.data_type]
        total += num_bytes
        if total > MAX_BYTES:
            shape = list(tensor.dims)
            raise BundleError(f"{where}: expected at most {MAX_BYTES} bytes in all, got {shape}")
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            stored = max(len(getattr(tensor, field)) for field in TYPED_FIELDS)
            whole = len(tensor.raw_data) == num_bytes and not stored
            if not whole and (tensor.raw_data or stored != elements):
                got = f"{len(tensor.raw_data)} bytes and {stored} numbers"
                raise BundleError(f"{where}: expected {elements} numbers, got {got}")


def _load_external(tensor: onnx.TensorProto, path: Path) -> None:
    """Read a weight from a file in the model's folder into the message.

    Raises `BundleError` for a file outside of the folder, also behind a link, and for a range that
    the file does not have.
    """
    where = f"{path}: weight {tensor.name[:80]!r}"
    fields = {entry.key: entry.value for entry in tensor.external_data}
    num_bytes = math.prod(tensor.dims) * ITEM_BYTES[tensor.data_type]
    location = fields.get("location", "")
    folder = path.parent.resolve()
    file = (folder / location).resolve() if "\0" not in location else folder
    if not location or Path(location).is_absolute() or not file.is_relative_to(folder):
        raise BundleError(f"{where}: expected data in the model's folder, got {location[:200]!r}")
    try:
        offset, length = int(fields.get("offset", 0)), int(fields.get("length", num_bytes))
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        with open(descriptor, "rb") as data:
            status = os.fstat(descriptor)
            known = stat.S_ISREG(status.st_mode) and 0 <= offset <= status.st_size - length
            if not known or length != num_bytes:
                raise BundleError(
                    f"{where}: expected {num_bytes} bytes at {offset} in {location[:200]!r}, got a "
                    f"range of {length} in {status.st_size} bytes"
                )
            data.seek(offset)
            tensor.raw_data = data.read(length)
    except (OSError, ValueError) as error:
        raise BundleError(f"{where}: {error}") from error
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.DEFAULT


def _check_declared_shapes(graph: onnx.GraphProto, path: Path) -> None:
    """Raise `BundleError` for a declared shape that no network has."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        known = math.prod(dim for dim in dims if dim)
        if len(dims) > MAX_RANK or min(dims, default=0) < 0 or known > MAX_ELEMENTS:
            shape = dims[:MAX_RANK]
            raise BundleError(
                f"{path}: tensor {value.name[:80]!r}: expected at most {MAX_ELEMENTS} elements, "
                f"got shape {shape}"
            )

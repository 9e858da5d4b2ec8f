"""What `ladderstitch inspect` reports of an ONNX file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import onnx

from ladderstitch.errors import BundleError
from ladderstitch.importers.image_settings import ImageSettings, read_settings
from ladderstitch.importers.onnx_networks import DEFAULT_SIZE
from ladderstitch.vision.networks.order import DataFlow, network_inputs
from ladderstitch.vision.networks.probe import NetworkInfo, fix_size, probe
from ladderstitch.vision.networks.reader import read_network

MAX_SHOWN = 60
"""Characters of a name in a table; the rest is left out at its beginning."""


@dataclass(frozen=True, slots=True)
class NetworkReport:
    """The tensors, costs and cuts of a network as cells of tables.

    `summary` states the number of cuts, or why none can be used.
    """

    tensors: list[tuple[str, ...]]
    parameters: int
    macs: str
    summary: str
    cuts: list[tuple[str, ...]]


def inspect_network(path: Path, image_size: int | None = None) -> NetworkReport:
    """Return the report of the network in an ONNX file.

    `image_size` is the side of its images if the file leaves it open. Raises `BundleError` for a
    file that is rejected; a network that cannot be run with batches of images is still reported.
    """
    model = read_network(path)
    inputs, outputs = network_inputs(model.graph), list(model.graph.output)
    tensors: list[tuple[str, ...]] = [("input", *_describe(value)) for value in inputs]
    tensors += [("output", *_describe(value)) for value in outputs]
    parameters = sum(math.prod(tensor.dims) for tensor in model.graph.initializer)
    flow = DataFlow(model.graph)
    if len(inputs) != 1:
        summary = f"none, because the network has {len(inputs)} inputs"
        return NetworkReport(tensors, parameters, "not counted", summary, [])
    dims = [dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim][1:]
    settings = ImageSettings() if image_size is None else ImageSettings((image_size,) * 2)
    settings = settings.over(read_settings(path))
    missing = iter(settings.size or (DEFAULT_SIZE, DEFAULT_SIZE))
    shape = [dim or (3 if place == 0 else next(missing, 1)) for place, dim in enumerate(dims)]
    fix_size(model, shape)
    try:
        info = probe(model, path)
    except BundleError as error:
        summary = f"{len(flow.cuts())} by the order of the operators, none can be used: {error}"
        return NetworkReport(tensors, parameters, "not counted", summary, [])
    return _report(info, tensors, parameters, shape)


def _report(
    info: NetworkInfo, tensors: list[tuple[str, ...]], parameters: int, shape: list[int]
) -> NetworkReport:
    """Return the report of a network that ran on images of this shape."""
    cuts: list[tuple[str, ...]] = [
        (
            str(position),
            str(list(cut.shape)),
            f"{cut.macs / 1e6:.2f}",
            cut.operator,
            _shorten(cut.name),
        )
        for position, cut in enumerate(info.cuts)
    ]
    summary = f"{len(cuts)} for images {shape}, shapes without the batch"
    return NetworkReport(tensors, parameters, f"{info.macs:,} for images {shape}", summary, cuts)


def _describe(value: onnx.ValueInfoProto) -> tuple[str, str, str]:
    """Return the name, type and shape of an input or output."""
    kind = value.type.tensor_type
    dims = [dim.dim_param or (dim.dim_value or "?") for dim in kind.shape.dim]
    shape = ", ".join(str(dim)[:20] for dim in dims)
    names = onnx.TensorProto.DataType
    return _shorten(value.name), names.Name(kind.elem_type).lower(), f"[{shape}]"


def _shorten(name: str) -> str:
    return name if len(name) <= MAX_SHOWN else f"...{name[3 - MAX_SHOWN :]}"

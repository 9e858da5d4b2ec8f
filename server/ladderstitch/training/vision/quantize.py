"""Quantise a family: the graph of every unit with 8-bit weights and 8-bit inputs of its products.

Quantisation is static: the ranges of activations come from sample images that pass every network.
A unit has the same graph in all networks, so that its weights exist once. What leaves one unit and
enters another has the same range on both sides, so that joined graphs stay in 8 bits in between.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import yaml
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QDQQuantizer,
    QuantType,
    create_calibrator,
)
from onnxruntime.quantization.calibrate import TensorsData

from ladderstitch.errors import ConfigError
from ladderstitch.runtime import ProgressCallback
from ladderstitch.runtime.sessions import open_session
from ladderstitch.scheduling.requests import Pixels
from ladderstitch.vision.bundle import VisionBundle, write_table
from ladderstitch.vision.models.graphs import INPUT, OUTPUT, cached_units, route_units
from ladderstitch.vision.models.nested.model import NestedConfig

Range = tuple[float, float]
"""Smallest and largest value of a tensor."""
Ranges = dict[str, Range]
"""Range by the tensor's name in its graph."""

MAP_OPERATORS = ("Conv", "Add", "Relu", "Clip", "MaxPool")
"""Operators in 8 bits of units on feature maps, which stay in 8 bits from one to the next."""
TOKEN_OPERATORS = ("Conv", "MatMul", "Gemm")
"""Operators in 8 bits of units on tokens; the sums between them need more precision."""
ACTIVATIONS_ONLY = "MatMul"
"""Operator that stays in float32 if it has no weights: products of attention."""
EDGE_PASSES = 100
"""Bound of the passes that equalise ranges; each passes a range on by one unit."""


def quantize(bundle: VisionBundle, images: Pixels, on_progress: ProgressCallback) -> None:
    """Add an int8 form of every network to a bundle, with ranges from images [N, C, H, W].

    Writes the graphs of the units, and `precisions` in `model.yaml`. The new variants must be
    calibrated then. Classifiers stay in float32: they take little time, and their error is not
    corrected by later layers. Weights have 7 bits, because processors without 8-bit dot products
    would saturate sums of 8-bit ones; all processors give the same quality. Raises
    `ConfigError` for a supernet, whose weights have other ranges in each path.
    """
    if isinstance(bundle.manifest.config, NestedConfig):
        raise ConfigError(f"bundle: expected a family of anchors, got the supernet {bundle.path}")
    shape = images.shape[1:]
    units = cached_units(bundle.digest(), bundle.load_stitched, shape, lambda done, total: None)
    routes = [route_units(s) for s in bundle.manifest.config.stitches() if s.usable]
    with tempfile.TemporaryDirectory(prefix="ladderstitch-") as name:
        folder = Path(name)
        chosen = {n for route in routes for n in route if not n.startswith("classify")}
        graphs = {n: _infer_shapes(units / f"{n}.onnx", folder / f"{n}.onnx") for n in chosen}
        ranges = measure_ranges(graphs, units, routes, images, on_progress)
    equalise_ranges(ranges, routes)
    bundle.int8_folder.mkdir(exist_ok=True)
    for unit, tensors in ranges.items():
        path = units / f"{unit}.onnx"
        onnx.save(quantize_unit(onnx.load(path), tensors), bundle.int8_folder / path.name)
    _add_precision(bundle)


def _infer_shapes(source: Path, target: Path) -> Path:
    """Write the graph with the shapes of all tensors, which the calibrator needs."""
    onnx.save(onnx.shape_inference.infer_shapes(onnx.load(source)), target)
    return target


class _Batch(CalibrationDataReader):  # type: ignore[misc]  # the library has no types
    """The input of one unit, once."""

    def __init__(self, x: Pixels) -> None:
        self._left = [{INPUT: x}]

    def get_next(self) -> dict[str, Pixels] | None:
        """Return the input, then None."""
        return self._left.pop() if self._left else None


def measure_ranges(
    graphs: Mapping[str, Path],
    units: Path,
    routes: Sequence[tuple[str, ...]],
    images: Pixels,
    on_progress: ProgressCallback,
) -> dict[str, Ranges]:
    """Return the ranges within each unit of `graphs`, over all routes that pass it.

    `graphs` are files with inferred shapes; `units` is the folder of all units.
    """
    calibrators = {
        unit: create_calibrator(
            path, operators_of(onnx.load(path)), str(path.with_suffix(".augmented.onnx"))
        )
        for unit, path in graphs.items()
    }
    sessions = {n: open_session(str(units / f"{n}.onnx"), 1) for r in routes for n in r}
    prefixes = list(_walk(routes))
    outputs: dict[tuple[str, ...], Pixels] = {(): images}
    for done, prefix in enumerate(prefixes, 1):
        # The prefixes are sorted, so that only those of the present one are needed again.
        outputs = {p: x for p, x in outputs.items() if prefix[: len(p)] == p}
        x, unit = outputs[prefix[:-1]], prefix[-1]
        if unit in calibrators:
            calibrators[unit].collect_data(_Batch(x))
        (outputs[prefix],) = sessions[unit].run((OUTPUT,), {INPUT: x})
        on_progress(done, len(prefixes))
    return {unit: _read_ranges(c.compute_data()) for unit, c in calibrators.items()}


def _walk(routes: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Yield every beginning of a route once, sorted, shorter ones first."""
    yield from sorted({route[:n] for route in routes for n in range(1, len(route) + 1)})


def _read_ranges(data: TensorsData) -> Ranges:
    return {
        name: (float(np.min(entry.lowest)), float(np.max(entry.highest)))
        for name, entry in data.items()
    }


def equalise_ranges(ranges: dict[str, Ranges], routes: Sequence[tuple[str, ...]]) -> None:
    """Give the output of each unit and the inputs of those after it one range; in place.

    An output that is never negative keeps its range if an input after it may be negative: the
    quantizer removes an activation whose range starts at 0, and would let negative values pass.
    """
    edges = {(a, b) for route in routes for a, b in pairwise(route)}
    joined = [
        ((a, OUTPUT), (b, INPUT))
        for a, b in sorted(edges)
        if OUTPUT in ranges.get(a, ())
        and INPUT in ranges.get(b, ())
        and (ranges[a][OUTPUT][0] < 0) == (ranges[b][INPUT][0] < 0)
    ]
    for _ in range(EDGE_PASSES):
        before = {unit: dict(tensors) for unit, tensors in ranges.items()}
        for ends in joined:
            both = [ranges[unit][tensor] for unit, tensor in ends]
            for unit, tensor in ends:
                ranges[unit][tensor] = (min(r[0] for r in both), max(r[1] for r in both))
        if ranges == before:
            return


def operators_of(graph: onnx.ModelProto) -> tuple[str, ...]:
    """Return the operators of a unit that run in 8 bits."""
    kinds = {node.op_type for node in graph.graph.node}
    on_maps = "Conv" in kinds and not kinds & {"MatMul", "Gemm"}
    return MAP_OPERATORS if on_maps else TOKEN_OPERATORS


def quantize_unit(graph: onnx.ModelProto, ranges: Ranges) -> onnx.ModelProto:
    """Return the graph with 8-bit weights, and with 8-bit activations of these ranges."""
    operators = operators_of(graph)
    tensors = TensorsData(
        CalibrationMethod.MinMax, {n: tuple(np.float32(v) for v in r) for n, r in ranges.items()}
    )
    quantizer = QDQQuantizer(
        onnx.shape_inference.infer_shapes(graph),
        per_channel=True,
        reduce_range=True,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=tensors,
        nodes_to_quantize=None,
        nodes_to_exclude=_find_products_of_activations(graph),
        op_types_to_quantize=operators,
        extra_options={} if operators == MAP_OPERATORS else _FLOAT_OUTPUTS,
    )
    quantizer.quantize_model()
    quantised: onnx.ModelProto = quantizer.model.model
    return quantised


_FLOAT_OUTPUTS = {"OpTypesToExcludeOutputQuantization": list(TOKEN_OPERATORS)}


def _find_products_of_activations(graph: onnx.ModelProto) -> list[str]:
    weights = {tensor.name for tensor in graph.graph.initializer}
    return [
        node.name
        for node in graph.graph.node
        if node.op_type == ACTIVATIONS_ONLY and not weights & set(node.input)
    ]


def _add_precision(bundle: VisionBundle) -> None:
    """Write `precisions` into `model.yaml`, and remove measurements of older int8 graphs."""
    old = {variant.id for variant in bundle.manifest.variants({"int8"})}
    for name, table in (("quality.json", bundle.quality), ("latency.json", bundle.latency)):
        if table is not None and old & table.variants.keys():
            kept = {i: entry for i, entry in table.variants.items() if i not in old}
            write_table(bundle.path / name, table.model_copy(update={"variants": kept}))
    path = bundle.path / "model.yaml"
    fields = yaml.safe_load(path.read_text()) | {"precisions": ["float32", "int8"]}
    path.write_text(yaml.safe_dump(fields, sort_keys=False, width=100))

"""Measure a network by running it on random images: shapes, arithmetic, cut points.

The exact shapes at three batch sizes replace symbolic shape inference, which stops at the operators
that transformers are exported to. Shapes are checked by inference before anything is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from ladderstitch.errors import BundleError
from ladderstitch.runtime.sessions import ERRORS_ONLY
from ladderstitch.vision.networks.bounds import check_tensor_sizes
from ladderstitch.vision.networks.costs import count_costs, tensors_of_products
from ladderstitch.vision.networks.order import DataFlow, network_inputs

BATCHES = (2, 3, 5)
"""Batch sizes of the runs; 1 is not one of them, because exporters treat it as a constant."""
BATCH_TOLERANCE = 1e-3
"""Largest difference between a batch and single images, relative to the largest output."""
BATCH_ADVICE = (
    "export the network with a dynamic batch axis, and quantise it with static ranges: "
    "DynamicQuantizeLinear computes one range for all images of a batch"
)
EXTREME_SCALE = 1e4
FLOAT = "tensor(float)"


@dataclass(frozen=True, slots=True)
class Cut:
    """A tensor through which all data of a network pass.

    `shape` is without the batch. `macs` and `parameters` are those of the network before it.
    """

    name: str
    operator: str
    shape: tuple[int, ...]
    macs: int
    parameters: int


@dataclass(frozen=True, slots=True)
class NetworkInfo:
    """What a network takes and returns (shapes without the batch), costs, and where it can be cut.

    `macs` counts the multiply-accumulates of convolutions and matrix products for one image.
    `shape_values` has each shape value v at batch size B as (a, b), where v = a + b B.
    """

    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]
    output_types: dict[str, str]
    macs: int
    parameters: int
    cuts: tuple[Cut, ...]
    shape_values: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]


def fix_size(model: onnx.ModelProto, shape: Sequence[int]) -> None:
    """Let the network take inputs of `shape`, for images [C, H, W], in batches of any size.

    The change is in place.
    Declared shapes of other tensors are removed, because they may hold for one batch size only.
    """
    (image,) = network_inputs(model.graph)
    dims = image.type.tensor_type.shape
    del dims.dim[:]
    dims.dim.add().dim_param = "batch"
    for size in shape:
        dims.dim.add().dim_value = size
    del model.graph.value_info[:]
    for output in model.graph.output:
        if output.type.tensor_type.elem_type:
            output.type.tensor_type.ClearField("shape")
        else:
            output.ClearField("type")


def probe(model: onnx.ModelProto, path: Path) -> NetworkInfo:
    """Return the shapes, the costs and the cuts of a network after `fix_size`.

    Raises `BundleError` if a tensor would be larger than that of any network, if the network does
    not run, or if it does not take batches of any size.
    """
    check_tensor_sizes(model, BATCHES[0], path)
    flow = DataFlow(model.graph)
    cuts = flow.cuts()
    counted = tensors_of_products(flow)
    shape_outputs = [
        name
        for number, node in enumerate(flow.nodes)
        if node.op_type in ("Shape", "Size") and flow.shape_values.intersection(node.output)
        for name in flow.nodes[number].output
    ]
    session = _open_probe(model, [*cuts, *flow.outputs, *counted], shape_outputs, path)
    runs = _run_batches(session, model, [*cuts, *flow.outputs, *counted], shape_outputs, path)
    types = {output.name: output.type for output in session.get_outputs()}
    shapes = {name: tuple(int(size) for size in shape) for name, shape in runs[0].shapes.items()}
    macs, parameters = count_costs(flow, model.graph, shapes, BATCHES[0])
    found = tuple(
        Cut(name, flow.nodes[at].op_type, shapes[name][1:], sum(macs[: at + 1]), parameters[at])
        for name in cuts
        if types[name] == FLOAT and len(shapes[name]) > 1 and _is_batch_first(name, runs)
        for at in [flow.writer[name]]
    )
    (image,) = network_inputs(model.graph)
    return NetworkInfo(
        inputs={image.name: tuple(d.dim_value for d in image.type.tensor_type.shape.dim[1:])},
        outputs={n: shapes[n][1:] for n in flow.outputs if _is_batch_first(n, runs)},
        output_types={name: types[name] for name in flow.outputs},
        macs=sum(macs),
        parameters=parameters[-1],
        cuts=found,
        shape_values=_fit_shape_values(shape_outputs, runs, path),
    )


def check_batches(session: onnxruntime.InferenceSession, path: Path) -> None:
    """Raise `BundleError` unless the images of a batch have the outputs of single images.

    The server puts images of several callers into one batch. That holds for three random images,
    and for the first of them in a batch with any of `_extreme_neighbours`.
    """
    (image,) = session.get_inputs()
    images = _random_images(3, image.shape[1:])
    alone = [session.run(None, {image.name: images[i : i + 1]}) for i in range(3)]
    single = [np.concatenate(outputs) for outputs in zip(*alone, strict=True)]
    together = session.run(None, {image.name: images})
    if any(found.shape != one.shape for found, one in zip(together, single, strict=True)):
        raise BundleError(f"{path}: expected output shapes that grow with the batch, got others")
    difference = _largest_difference(together, single)
    if not difference <= BATCH_TOLERANCE:
        raise BundleError(
            f"{path}: expected the same outputs for images in a batch and alone, got a "
            f"relative difference of {difference:.1e}; {BATCH_ADVICE}"
        )
    for neighbour, values in _extreme_neighbours(images).items():
        try:
            found = session.run(None, {image.name: np.concatenate([images[:1], values])})
        except Exception:  # the errors of ONNX Runtime have no common class
            continue  # such a batch fails when it is served, too, and is run image by image
        difference = _largest_difference([output[:1] for output in found], alone[0])
        if not difference <= BATCH_TOLERANCE:
            raise BundleError(
                f"{path}: expected outputs of an image that do not depend on the others of its "
                f"batch, got a relative difference of {difference:.1e} next to {neighbour}; "
                f"{BATCH_ADVICE}"
            )


def _extreme_neighbours(images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Return images [1, ...] that callers can send, by description.

    Operators that compute a range or a mean over the whole batch show their influence on others.
    """
    return {
        "an image of zeros": np.zeros_like(images[:1]),
        f"one {EXTREME_SCALE:g} times as bright": EXTREME_SCALE * images[1:2],
        "one of NaN": np.full_like(images[:1], np.nan),
    }


def _largest_difference(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """Return the largest difference, relative to the largest value; NaN if there is a NaN."""
    differences = [0.0]
    for output, other in zip(found, expected, strict=True):
        values, wanted = output.astype(np.float64), other.astype(np.float64)
        scale = max(1.0, float(np.abs(wanted).max(initial=0)))
        differences.append(float(np.abs(values - wanted).max(initial=0)) / scale)
    return float(np.max(differences))


@dataclass(frozen=True, slots=True)
class _Run:
    """The shapes of tensors and the shape values of one run."""

    batch: int
    shapes: dict[str, NDArray[np.int64]]
    values: dict[str, NDArray[np.int64]]


def _open_probe(
    model: onnx.ModelProto, tensors: Sequence[str], values: Sequence[str], path: Path
) -> onnxruntime.InferenceSession:
    """Return a session that also returns the shapes of `tensors`, and `values`."""
    probing = onnx.ModelProto()
    probing.CopyFrom(model)
    present = {output.name for output in probing.graph.output}
    for number, name in enumerate(dict.fromkeys(tensors)):
        node = onnx.helper.make_node("Shape", [name], [_shape_name(name)], f"probe-{number}")
        probing.graph.node.append(node)
        probing.graph.output.add().name = _shape_name(name)
    for name in dict.fromkeys((*tensors, *values)):
        if name not in present:
            probing.graph.output.add().name = name
    return open_quietly(probing, path, optimised=False)


def open_quietly(
    model: onnx.ModelProto, path: Path, *, optimised: bool = True
) -> onnxruntime.InferenceSession:
    """Return a session of a model; raises `BundleError` if ONNX Runtime cannot run it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY + 1
    if not optimised:
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # the errors of ONNX Runtime have no common class
        raise BundleError(f"{path}: expected a network that ONNX Runtime runs: {error}") from error


def _run_batches(
    session: onnxruntime.InferenceSession,
    model: onnx.ModelProto,
    tensors: Sequence[str],
    values: Sequence[str],
    path: Path,
) -> list[_Run]:
    """Return the shapes and the shape values of a run at each batch size."""
    (image,) = network_inputs(model.graph)
    shape = [dim.dim_value for dim in image.type.tensor_type.shape.dim[1:]]
    names = list(dict.fromkeys(tensors))
    wanted = [*map(_shape_name, names), *values]
    runs = []
    for batch in BATCHES:
        try:
            results: list[Any] = session.run(wanted, {image.name: _random_images(batch, shape)})
        except Exception as error:  # the errors of ONNX Runtime have no common class
            raise BundleError(
                f"{path}: expected a network for batches of any size of images {shape}; export it "
                f"with a dynamic batch axis: {error}"
            ) from error
        shapes = dict(zip(names, results[: len(names)], strict=True))
        runs.append(_Run(batch, shapes, dict(zip(values, results[len(names) :], strict=True))))
    return runs


def _random_images(batch: int, shape: Sequence[int]) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(batch, *shape)).astype(np.float32)


def _shape_name(tensor: str) -> str:
    return f"probed shape of {tensor}"


def _is_batch_first(name: str, runs: Iterable[_Run]) -> bool:
    """Return whether the first axis of a tensor is the batch and the others have one size."""
    shapes = [tuple(run.shapes[name]) for run in runs]
    expected = [(run.batch, *shapes[0][1:]) for run in runs]
    return len(shapes[0]) > 0 and shapes == expected


def _fit_shape_values(
    names: Sequence[str], runs: Sequence[_Run], path: Path
) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return (a, b) of each shape value that is a + b B; values of another form are left out."""
    fitted = {}
    for name in names:
        first, second, third = (np.asarray(run.values[name], np.int64) for run in runs)
        slope = (second - first) // (BATCHES[1] - BATCHES[0])
        offset = first - slope * BATCHES[0]
        if np.array_equal(offset + slope * BATCHES[2], third):
            fitted[name] = (offset, slope)
    return fitted

"""What networks and stitched paths compute, by ONNX Runtime on the files and numpy in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ladderstitch.vision.networks.maps import Features

REPLACED = "replaced tensor"
"""The input that `replace_tensor` adds."""
Array = NDArray[np.float32]


def run_file(model: onnx.ModelProto, names: Sequence[str], inputs: dict[str, Array]) -> list[Array]:
    """Return tensors of a model, computed by ONNX Runtime without optimisations."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return [np.asarray(session.run([name], inputs)[0]) for name in names]


def replace_tensor(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Return a model whose operators read the input `REPLACED` instead of a tensor."""
    for node in model.graph.node:
        for place, read in enumerate(node.input):
            if read == name:
                node.input[place] = REPLACED
    kind = onnx.TensorProto.FLOAT
    model.graph.input.append(onnx.helper.make_tensor_value_info(REPLACED, kind, None))
    return model


def apply_map(features: Array, shape: Sequence[int], weight: Array, bias: Array) -> Array:
    """Return the features of `shape` [B, ...] to which an affine map leads, in float64."""
    front, end = Features.of(features.shape[1:]), Features.of(shape[1:])
    assert front is not None
    assert end is not None
    rows = features.astype(np.float64)
    if front.layout == "map":
        rows = np.moveaxis(rows, 1, -1)
    if front.grid is not None and end.grid is not None:
        rows = rows.reshape(len(rows), *front.grid, front.width)
        if front.grid != end.grid:
            maps = torch.from_numpy(np.moveaxis(rows, -1, 1))
            resized = F.interpolate(maps, end.grid, mode=_mode(len(end.grid)))
            rows = np.moveaxis(resized.numpy(), 1, -1)
    mapped = rows @ weight.astype(np.float64).T + bias
    if end.layout == "map":
        mapped = np.moveaxis(mapped, -1, 1)
    return mapped.reshape(shape).astype(np.float32)


def difference(got: Sequence[Array], expected: Sequence[Array]) -> float:
    """Return the largest difference relative to the largest value.

    It is infinity for other shapes, and for values that are not finite or all equal.
    """
    worst = 0.0
    for left, right in zip(got, expected, strict=True):
        flat = right.reshape(left.shape) if left.size == right.size else None
        if flat is None or not right.size or not np.isfinite(flat).all() or np.ptp(flat) == 0:
            return float("inf")
        scale = float(np.abs(flat).max())
        found = float(np.abs(left.astype(np.float64) - flat).max()) / scale
        worst = max(worst, found if np.isfinite(found) else float("inf"))
    return worst


def random_inputs(count: int, shape: Sequence[int], seed: int = 0) -> Array:
    """Return smooth random inputs [B, C, ...], whose means differ more than those of noise."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, shape[0], *(4 for _ in shape[1:]), generator=rng)
    return F.interpolate(2 * coarse, tuple(shape[1:]), mode=_mode(len(shape) - 1)).numpy()


def _mode(axes: int) -> str:
    """Return torch's name of linear interpolation along each of two or three axes."""
    return "bilinear" if axes == 2 else "trilinear"

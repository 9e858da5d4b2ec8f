"""Paths of a supernet as ONNX graphs without weights, which are bound to one set of tensors.

A graph has the slices and transforms of weights as operations, and names the supernet's tensors.
Only a path's own statistics of batch normalisation are in its graph. The caller that opens it
decides whether slices are computed at each run (weights exist once) or once (a faster copy).
"""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ladderstitch.runtime import ProgressCallback
from ladderstitch.runtime.cache import cached_folder
from ladderstitch.vision.models.graphs import INPUT, OPSET, OUTPUT, TRACED_BATCH
from ladderstitch.vision.models.nested.model import NestedModel

LAYOUT = 3
"""Version of the cached files; a change makes older ones unused."""
PREFIX = "model."
"""What precedes the names of the supernet's tensors in graphs."""


class _Path(nn.Module):
    """One path as a module of one argument."""

    def __init__(self, model: NestedModel, path: int) -> None:
        super().__init__()
        self.model, self.path = model, path

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.model(images, self.path)


def export_path(model: NestedModel, path: int) -> onnx.ModelProto:
    """Return the graph of a path of a float32 model in eval mode, with tensors by name only."""
    with tempfile.TemporaryDirectory(prefix="ladderstitch-") as folder:
        file = path_file(Path(folder), path)
        example = torch.zeros(TRACED_BATCH, *model.config.inputs.shape)
        _trace(_Path(model, path).eval(), example, file)
        graph = onnx.load(file)
    _bind_by_name(graph, model)
    _compute_indices(graph.graph)
    return graph


def _trace(network: nn.Module, example: Tensor, file: Path) -> None:
    """Write the graph of a network, with its parameters as inputs."""
    with warnings.catch_warnings():
        # torch prefers its newer exporter, which takes much longer
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (example,),
            str(file),
            dynamo=False,
            opset_version=OPSET,
            export_params=False,
            do_constant_folding=False,  # slices stay operations
            training=torch.onnx.TrainingMode.PRESERVE,  # batch normalisation stays one, too
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
        )


def _bind_by_name(model: onnx.ModelProto, source: NestedModel) -> None:
    """Turn the inputs that stand for the supernet's tensors into tensors without data."""
    tensors = {PREFIX + name: tensor for name, tensor in source.state_dict().items()}
    inputs = list(model.graph.input)
    used = {name for node in model.graph.node for name in node.input}
    del model.graph.input[:]
    for entry in inputs:
        if entry.name not in tensors:
            model.graph.input.append(entry)
        elif entry.name in used:
            stub = model.graph.initializer.add()
            stub.name, stub.data_type = entry.name, onnx.TensorProto.FLOAT
            stub.dims.extend(tensors[entry.name].shape)
            stub.data_location = onnx.TensorProto.EXTERNAL
            stub.external_data.add(key="location", value="weights")


def _compute_indices(graph: onnx.GraphProto) -> None:
    """Turn constants, and those with further axes, into tensors; equal ones exist once.

    They are the bounds of slices, four times as many nodes as there are others, and the path's
    statistics.
    """
    values: dict[str, NDArray[Any]] = {}
    kept = []
    for node in graph.node:
        (name,) = node.output[:1]
        if node.op_type == "Constant":
            values[name] = onnx.numpy_helper.to_array(node.attribute[0].t)
        elif node.op_type == "Unsqueeze" and all(source in values for source in node.input):
            data, axes = (values[source] for source in node.input)
            values[name] = np.expand_dims(data, tuple(axes.tolist()))
        else:
            kept.append(node)
    names: dict[tuple[bytes, str, tuple[int, ...]], str] = {}
    for node in kept:
        for number, name in enumerate(node.input):
            if name in values:
                value = values[name]
                key = (value.tobytes(), str(value.dtype), value.shape)
                if key not in names:
                    names[key] = name
                    graph.initializer.append(onnx.numpy_helper.from_array(value, name))
                node.input[number] = names[key]
    del graph.node[:]
    graph.node.extend(kept)


def bound_names(model: onnx.ModelProto) -> list[str]:
    """Return the names of the tensors that have no data in a graph."""
    return [t.name for t in model.graph.initializer if t.data_location == t.EXTERNAL]


def cached_paths(
    digest: str, load: Callable[[], NestedModel], on_progress: ProgressCallback
) -> Path:
    """Return the folder of a supernet's exported paths; export them if the cache lacks them.

    `digest` identifies weights, statistics and configuration; `load` returns the float32 model.
    """
    key = hashlib.sha256(f"{digest} nested {torch.__version__} {OPSET} {LAYOUT}".encode())

    def export(folder: Path) -> None:
        model = load()
        for done, stitch in enumerate(model.stitches, 1):
            onnx.save(export_path(model, stitch.id), path_file(folder, stitch.id))
            on_progress(done, len(model.stitches))

    return cached_folder("graphs", key.hexdigest()[:24], export)


def path_file(folder: Path, path: int) -> Path:
    """Return the file of a path's graph."""
    return folder / f"path-{path}.onnx"

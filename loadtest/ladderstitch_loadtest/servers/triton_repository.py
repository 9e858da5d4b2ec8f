"""Triton's model repository: one network of a bundle, with its preprocessing in the graph."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.models import graphs
from ladderstitch.vision.models.graphs import cached_units, join_units, unit_paths
from ladderstitch.vision.preprocessing import ImageReader

MODEL_CODE = Path(__file__).with_name("triton_model.py")
INPUT, OUTPUT = "images", "logits"
"""Names of the input and the output, those of `ladderstitch serve`."""
MAX_BATCH_SIZE = 32
"""The default of `ladderstitch serve`."""


def write_repository(folder: Path, name: str, bundle: VisionBundle, variant: int) -> None:
    """Write the repository of one model that runs a variant of a bundle.

    The first call for these weights exports them, as a server does.
    """
    version = folder / name / "1"
    version.mkdir(parents=True)
    reader = ImageReader(bundle.manifest.preprocessing)
    graph = _read_network(bundle, variant, reader.shape)
    add_preprocessing(graph, reader.scale, reader.shift)
    onnx.save(graph, version / "model.onnx")
    shutil.copyfile(MODEL_CODE, version / "model.py")
    config = format_config(name, reader.shape, len(bundle.manifest.labels))
    (folder / name / "config.pbtxt").write_text(config)


def _read_network(
    bundle: VisionBundle, variant: int, shape: tuple[int, int, int]
) -> onnx.ModelProto:
    """Return the graph of a variant, from float32 images [B, C, H, W] to logits [B, K]."""
    units = cached_units(bundle.digest(), bundle.load_stitched, shape, lambda done, total: None)
    (network,) = (one for one in bundle.manifest.variants() if one.id == variant)
    return join_units(unit_paths(network, units, bundle.int8_folder))


def add_preprocessing(model: onnx.ModelProto, scale: NDArray[Any], shift: NDArray[Any]) -> None:
    """Let a graph take uint8 pixels, which it multiplies by `scale` before it adds `shift`.

    Input and output become `images` and `logits`; `scale` and `shift` have shape [C, 1, 1].
    """
    graph = model.graph
    normalised = "preprocessing/normalised"
    _rename(graph, graphs.INPUT, normalised)
    _rename(graph, graphs.OUTPUT, OUTPUT)
    graph.input[0].name, graph.output[0].name = INPUT, OUTPUT
    graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    steps = (
        helper.make_node("Cast", [INPUT], ["preprocessing/pixels"], to=TensorProto.FLOAT),
        helper.make_node(
            "Mul", ["preprocessing/pixels", "preprocessing/scale"], ["preprocessing/scaled"]
        ),
        helper.make_node("Add", ["preprocessing/scaled", "preprocessing/shift"], [normalised]),
    )
    for position, step in enumerate(steps):
        graph.node.insert(position, step)
    for name, values in (("scale", scale), ("shift", shift)):
        graph.initializer.append(
            numpy_helper.from_array(values.astype(np.float32), f"preprocessing/{name}")
        )
    onnx.checker.check_model(model)


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Rename a value wherever a node reads or writes it."""
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = new


def format_config(name: str, shape: tuple[int, int, int], classes: int) -> str:
    """Return the text of `config.pbtxt`: dynamic batching without a delay, one instance."""
    dims = ", ".join(map(str, shape))
    return f"""name: "{name}"
backend: "python"
max_batch_size: {MAX_BATCH_SIZE}
input [ {{ name: "{INPUT}" data_type: TYPE_UINT8 dims: [ {dims} ] }} ]
output [ {{ name: "{OUTPUT}" data_type: TYPE_FP32 dims: [ {classes} ] }} ]
dynamic_batching {{ }}
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
"""

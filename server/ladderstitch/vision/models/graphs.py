"""Stitched models as ONNX graphs: one graph per unit, joined to the networks that use them.

A unit is an embedding, a block, a group of blocks, a stitching layer or a classifier of a family.
Every unit is exported once, with batches of any size, and kept in a cache; a network is a sequence
of units. Any number of networks therefore has the weights of a family once on the disk, and those
of each group once more.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import onnx
import torch
from onnx.compose import add_prefix
from torch import Tensor, nn

from ladderstitch.runtime import ProgressCallback
from ladderstitch.runtime.cache import cached_folder
from ladderstitch.vision.models.parallel import find_serving_part
from ladderstitch.vision.models.route import Stitch
from ladderstitch.vision.models.stitched import Backbone, StitchedModel

INPUT, OUTPUT = "x", "y"
"""Names of the only input and output of every graph; their first axis is the batch."""
OPSET = 17
LAYOUT = 1
"""Version of the cached files; a change makes older ones unused."""
TRACED_BATCH = 2
"""Batch size of the traced example; the tracer would take 1 for a constant."""


def route_units(stitch: Stitch) -> tuple[str, ...]:
    """Return the names of the units that a stitch runs, in order."""
    names = [f"embed-{stitch.front}"]
    for segment, layer in zip(stitch.segments, (*stitch.layers, None), strict=True):
        names += [_part_name(segment.anchor, first, size) for first, size in segment.parts]
        if layer is not None:
            names.append(f"layer-{layer.removesuffix('.transform')}")
    names.append(f"classify-{stitch.end}" + ("" if stitch.final_norm else "-without-norm"))
    return tuple(names)


def _part_name(anchor: int, first: int, size: int) -> str:
    return f"block-{anchor}-{first}" if size == 1 else f"group-{anchor}-{first}-{size}"


def unit_paths(stitch: Stitch, folder: Path, int8_folder: Path) -> tuple[Path, ...]:
    """Return the files of the units that a stitch runs, in order.

    `folder` has all units in float32. Units that `int8_folder` lacks stay in float32.
    """
    paths = [folder / f"{name}.onnx" for name in route_units(stitch)]
    if stitch.precision == "int8":
        quantised = [int8_folder / path.name for path in paths]
        paths = [q if q.exists() else p for q, p in zip(quantised, paths, strict=True)]
    return tuple(paths)


class _Embedding(nn.Module):
    """`Backbone.embed` as a module."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """Return the input of step 0."""
        return self.backbone.embed(images)


class _Classifier(nn.Module):
    """`Backbone.classify` as a module."""

    def __init__(self, backbone: Backbone, *, final_norm: bool) -> None:
        super().__init__()
        self.backbone, self.final_norm = backbone, final_norm

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.backbone.classify(x, final_norm=self.final_norm)


def _find_unit(model: StitchedModel, name: str) -> nn.Module:
    """Return the module of a unit by its name."""
    kind, _, rest = name.partition("-")
    if kind == "layer":
        return model.get_submodule(rest)
    anchor, _, detail = rest.partition("-")
    backbone = model.backbones()[int(anchor)]
    if kind == "embed":
        return _Embedding(backbone)
    if kind in ("block", "group"):
        first, _, size = detail.partition("-")
        return find_serving_part(backbone.steps(), int(first), int(size or 1))
    return _Classifier(backbone, final_norm=not detail)


def export_units(
    model: StitchedModel, folder: Path, image_shape: Sequence[int], on_progress: ProgressCallback
) -> None:
    """Write `NAME.onnx` for every unit of a float32 model in eval mode into a folder.

    Each unit is traced on the output of the unit before it, which starts from images
    [2, C, H, W] of `image_shape` (C, H, W).
    """
    routes = [route_units(stitch) for stitch in model.stitches]
    total = len({name for route in routes for name in route})
    outputs: dict[str, Tensor] = {}
    for route in routes:
        x = torch.zeros(TRACED_BATCH, *image_shape)
        for name in route:
            if name not in outputs:
                unit = _find_unit(model, name)
                _export(unit, x, folder / f"{name}.onnx")
                with torch.no_grad():
                    outputs[name] = unit(x)
                on_progress(len(outputs), total)
            x = outputs[name]


def _export(unit: nn.Module, example: Tensor, path: Path) -> None:
    """Write the graph of one unit."""
    with warnings.catch_warnings():
        # torch prefers its newer exporter, which takes 3 s instead of 0.1 s a graph
        warnings.simplefilter("ignore")
        torch.onnx.export(
            unit.eval(),
            (example,),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
        )


def cached_units(
    digest: str,
    load: Callable[[], StitchedModel],
    image_shape: Sequence[int],
    on_progress: ProgressCallback,
) -> Path:
    """Return the folder of a model's exported units; export them if the cache lacks them.

    `digest` identifies the weights and the architecture; `load` returns the float32 model.
    """
    key = hashlib.sha256(f"{digest} {torch.__version__} {OPSET} {LAYOUT}".encode())

    def export(folder: Path) -> None:
        export_units(load(), folder, image_shape, on_progress)

    return cached_folder("graphs", key.hexdigest()[:24], export)


def join_units(paths: Sequence[Path]) -> onnx.ModelProto:
    """Return one graph that runs the units in these files one after another.

    All must use the same versions of operators.
    """
    return _join([onnx.load(path) for path in paths])


def join_runs(paths: Sequence[Path]) -> list[onnx.ModelProto]:
    """Return graphs that run the units one after another, each as long as the versions allow.

    Two networks of a user may have been exported for different versions of operators.
    """
    units = [onnx.load(path) for path in paths]
    return [_join(list(run)) for _, run in groupby(units, key=_versions)]


def _versions(model: onnx.ModelProto) -> list[tuple[str, int]]:
    return sorted((entry.domain, entry.version) for entry in model.opset_import)


def _join(units: Sequence[onnx.ModelProto]) -> onnx.ModelProto:
    if len(units) == 1:
        return units[0]
    parts = [add_prefix(unit, f"{i}/") for i, unit in enumerate(units)]
    whole = parts[0]
    whole.ir_version = max(part.ir_version for part in parts)
    graph = whole.graph
    for number, part in enumerate(parts[1:], 1):
        join = onnx.helper.make_node("Identity", [f"{number - 1}/{OUTPUT}"], [f"{number}/{INPUT}"])
        graph.node.extend([join, *part.graph.node])
        graph.initializer.extend(part.graph.initializer)
    last = f"{len(parts) - 1}/{OUTPUT}"
    graph.node.insert(0, onnx.helper.make_node("Identity", [INPUT], [f"0/{INPUT}"]))
    graph.node.append(onnx.helper.make_node("Identity", [last], [OUTPUT]))
    graph.input[0].name = INPUT
    del graph.output[:]
    graph.output.extend(parts[-1].graph.output)
    graph.output[0].name = OUTPUT
    return whole

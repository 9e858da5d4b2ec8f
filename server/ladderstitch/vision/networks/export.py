"""The units of a bundle of ONNX networks as files: cut once, kept in the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ladderstitch.bundles import check_tensors
from ladderstitch.bundles.files import check_safetensors
from ladderstitch.errors import BundleError
from ladderstitch.runtime import ProgressCallback
from ladderstitch.runtime.cache import cached_folder
from ladderstitch.vision.networks.config import (
    NetworkEntry,
    OnnxConfig,
    StitchedPath,
    TensorInputs,
)
from ladderstitch.vision.networks.maps import Features, map_graph
from ladderstitch.vision.networks.scaling import Scaling, scaling_between
from ladderstitch.vision.networks.units import Network

LAYOUT = 1
"""Version of the cached files; a change makes older ones unused."""
NETWORKS_FOLDER = "networks"

Channels = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class NetworkFiles:
    """The files of a bundle of ONNX networks, and what the export of its units depends on.

    `mean`, `std` and `resize` are those of the bundle's preprocessing.
    """

    folder: Path
    config: OnnxConfig
    mean: Channels
    std: Channels
    resize: str = "bilinear"

    def network_path(self, entry: NetworkEntry) -> Path:
        """Return the file of a network."""
        return self.folder / NETWORKS_FOLDER / entry.file

    @property
    def maps_path(self) -> Path:
        """The file of the affine maps, which exists if there are stitched paths."""
        return self.folder / "weights.safetensors"

    def scaling(self, entry: NetworkEntry) -> Scaling | None:
        """Return the change from the bundle's images to those of a network; None if equal."""
        own = (entry.mean or self.mean, entry.std or self.std)
        if isinstance(self.config.inputs, TensorInputs):
            return scaling_between((self.mean, self.std), own)
        given = self.config.inputs.height, self.config.inputs.width
        return scaling_between(
            (self.mean, self.std),
            own,
            sizes=(given, entry.size or given),
            share=entry.crop or 1.0,
            resize=self.resize,
        )


def cached_network_units(files: NetworkFiles, digest: str, on_progress: ProgressCallback) -> Path:
    """Return the folder of the units of a bundle; cut the networks if the cache lacks them.

    `digest` identifies networks, maps and configuration. Raises `BundleError` for files that do
    not fit the configuration.
    """
    text = f"{digest} {files.mean} {files.std} {files.resize} {onnxruntime.__version__} {LAYOUT}"
    key = hashlib.sha256(text.encode()).hexdigest()[:24]
    return cached_folder("networks", key, lambda folder: export_units(files, folder, on_progress))


def export_units(files: NetworkFiles, folder: Path, on_progress: ProgressCallback) -> None:
    """Write `NAME.onnx` for every step of every network and for every map into a folder."""
    config = files.config
    total = sum(len(entry.cuts) + 1 for entry in config.networks) + len(config.paths)
    done = 0
    shapes: list[Mapping[str, tuple[int, ...]]] = []
    templates = []
    for position, entry in enumerate(config.networks):
        shape = config.inputs.shape
        if entry.size is not None:
            shape = (shape[0], *entry.size)
        network = Network(files.network_path(entry), shape)
        outputs = config.output_names(position)
        _check_outputs(network, config, outputs)
        shapes.append({name: cut.shape for name, cut in network.cuts.items()})
        templates.append(_empty_like(network.model))
        ends = (None, *entry.cuts, None)
        for step in range(len(entry.cuts) + 1):
            scaling = files.scaling(entry) if step == 0 else None
            unit = network.unit(ends[step], ends[step + 1], scaling, outputs)
            onnx.save(unit, folder / f"network-{position}-{step}.onnx")
            done += 1
            on_progress(done, total)
    maps = _read_maps(files, shapes) if config.paths else {}
    for path in config.paths:
        ends_of_map = joint_features(config, path, shapes)
        weight, bias = maps[f"{path.layer}.weight"], maps[f"{path.layer}.bias"]
        graph = map_graph(weight, bias, *ends_of_map, templates[path.front])
        onnx.save(graph, folder / f"{path.layer}.onnx")
        done += 1
        on_progress(done, total)


def joint_features(
    config: OnnxConfig, path: StitchedPath, shapes: list[Mapping[str, tuple[int, ...]]]
) -> tuple[Features, Features]:
    """Return the features that leave the front network and those that enter the end network.

    `shapes` has the shapes of the cuts of each network. Raises `BundleError` if no affine map leads
    from the one to the other.
    """
    names = config.networks[path.front].cuts[path.leave], config.networks[path.end].cuts[path.enter]
    for side, name in zip((path.front, path.end), names, strict=True):
        if name not in shapes[side]:
            raise BundleError(f"networks.{side}: expected the name of a cut, got {name[:80]!r}")
    front = Features.of(shapes[path.front][names[0]])
    end = Features.of(shapes[path.end][names[1]])
    if front is None or end is None or not front.can_map_to(end):
        raise BundleError(f"paths: expected cuts of features that can be mapped, got {names}")
    return front, end


def _check_outputs(network: Network, config: OnnxConfig, names: Sequence[str]) -> None:
    """Raise `BundleError` unless a network returns what the configuration states."""
    shapes = network.info.outputs
    if not names:
        (shape, *others) = shapes.values()
        if others or not shape or shape != (config.inputs.num_classes, *(1 for _ in shape[1:])):
            raise BundleError(
                f"{network.path}: expected class scores [batch, {config.inputs.num_classes}], got "
                f"{[['batch', *shape] for shape in shapes.values()]}"
            )
        return
    for name, output in zip(names, config.outputs, strict=True):
        if shapes.get(name) != output.shape:
            raise BundleError(
                f"{network.path}: expected an output {name[:80]!r} of shape "
                f"{['batch', *output.shape]}, got {list(shapes.get(name, ())) or 'none'}"
            )


def _empty_like(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model without a graph that has the versions of another one."""
    empty = onnx.ModelProto(ir_version=model.ir_version)
    empty.opset_import.extend(model.opset_import)
    return empty


def _read_maps(
    files: NetworkFiles, shapes: list[Mapping[str, tuple[int, ...]]]
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the weights of all maps; raises `BundleError` if one is missing or does not fit."""
    check_safetensors(files.maps_path)
    try:
        tensors = load_file(files.maps_path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{files.maps_path}: {error}") from error
    expected: dict[str, tuple[int, ...]] = {}
    for path in files.config.paths:
        front, end = joint_features(files.config, path, shapes)
        expected[f"{path.layer}.weight"] = (end.width, front.width)
        expected[f"{path.layer}.bias"] = (end.width,)
    got = {name: tensor.shape for name, tensor in tensors.items()}
    check_tensors(expected, got, where=str(files.maps_path))
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}

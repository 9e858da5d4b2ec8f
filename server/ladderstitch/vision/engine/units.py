"""The units of a bundle as files: those of its torch modules, or those of its ONNX networks."""

from __future__ import annotations

from pathlib import Path

from ladderstitch.runtime import ProgressCallback
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.models.graphs import cached_units, unit_paths
from ladderstitch.vision.models.nested.graphs import cached_paths, path_file
from ladderstitch.vision.models.nested.model import NestedConfig
from ladderstitch.vision.networks.config import OnnxConfig
from ladderstitch.vision.networks.export import cached_network_units


def export_bundle(bundle: VisionBundle, on_progress: ProgressCallback) -> Path:
    """Return the folder of a bundle's units in float32, which are exported if necessary.

    Raises `BundleError` if the weights do not fit.
    """
    config = bundle.manifest.config
    if isinstance(config, OnnxConfig):
        return cached_network_units(bundle.network_files, bundle.digest(), on_progress)
    if isinstance(config, NestedConfig):
        return cached_paths(bundle.digest(), bundle.load_nested, on_progress)
    shape = config.inputs.shape
    return cached_units(bundle.digest(), bundle.load_stitched, shape, on_progress)


def routes_of(bundle: VisionBundle, folder: Path) -> dict[int, tuple[Path, ...]]:
    """Return the files of the units of each variant, in order; `folder` is the exported one."""
    config, variants = bundle.manifest.config, bundle.manifest.variants()
    if isinstance(config, NestedConfig):
        return {v.id: (path_file(folder, v.id),) for v in variants}
    if isinstance(config, OnnxConfig):
        return {v.id: tuple(folder / f"{name}.onnx" for name in config.route(v)) for v in variants}
    return {v.id: unit_paths(v, folder, bundle.int8_folder) for v in variants}

"""Smaller bundles of supernets: only the paths on the measured frontier."""

from __future__ import annotations

import shutil
from pathlib import Path

from pydantic import BaseModel

from ladderstitch.errors import BundleError, ConfigError
from ladderstitch.vision.bundle import VisionBundle, write_manifest, write_table
from ladderstitch.vision.frontier import CostMetric, frontier_rows, load_measurements
from ladderstitch.vision.models.nested.model import NestedConfig
from ladderstitch.vision.models.nested.statistics import write_statistics


def prune(bundle: VisionBundle, into: Path, metric: CostMetric = "latency") -> list[str]:
    """Write a bundle with the paths of a supernet's frontier, and return their names.

    The paths keep their names and get new ids, in order of cost; measurements and statistics are
    copied. Raises `ConfigError` for another family, and `BundleError` if a measurement is missing
    or `into` exists.
    """
    manifest = bundle.manifest
    if not isinstance(manifest.config, NestedConfig):
        raise ConfigError(f"prune: expected a supernet, got the family {manifest.family}")
    if into.exists():
        raise BundleError(f"{into}: expected a new folder, got one that exists")
    quality, latency = load_measurements(bundle)
    kept = [row.stitch for row in frontier_rows(bundle, metric) if row.on_frontier]
    config = _keep(manifest.config, kept)
    into.mkdir(parents=True)
    write_manifest(into, manifest.model_copy(update={"config": config}))
    shutil.copyfile(bundle.weights_path, into / "weights.safetensors")
    if bundle.statistics_path.exists():
        model, pruned = bundle.load_nested(), config.build()
        pruned.statistics.update((new, model.statistics[old]) for new, old in enumerate(kept))
        write_statistics(into / bundle.statistics_path.name, pruned)
    for name, table in (("quality", quality), ("latency", latency)):
        variants = {new: table.variants[old] for new, old in enumerate(kept)}
        write_table(into / f"{name}.json", table.model_copy(update={"variants": variants}))
    return [stitch.name for stitch in config.stitches()]


def _keep(config: NestedConfig, kept: list[int]) -> NestedConfig:
    """Return the family with these paths only, under their present names."""
    names = {stitch.id: stitch.name for stitch in config.stitches()}
    chosen: list[BaseModel] = [config.net.paths[path] for path in kept]
    return config.with_paths(
        path.model_dump() | {"name": names[old]} for old, path in zip(kept, chosen, strict=True)
    )

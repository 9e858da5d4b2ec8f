"""Bundles of supernets from checkpoints of other projects, with sampled or listed paths."""

from __future__ import annotations

from pathlib import Path

from ladderstitch.errors import ConfigError
from ladderstitch.importers.attentive_nas import published_paths
from ladderstitch.importers.checkpoints import read_weights
from ladderstitch.importers.import_bundle import BundleInfo, build_manifest, read_fields
from ladderstitch.importers.nested_families import (
    import_nested,
    read_nested,
    released_config,
)
from ladderstitch.vision.bundle import write_bundle
from ladderstitch.vision.models.nested.model import NestedModel

DEFAULT_PATHS = 60
"""Paths that are sampled if the user states no number."""


def import_supernet(
    family: str,
    checkpoint: Path,
    config: Path | None,
    info: BundleInfo,
    into: Path,
    *,
    paths: int | None = None,
    seed: int = 0,
) -> NestedModel:
    """Write the bundle of a supernet's own checkpoint and return its model.

    `config` is a JSON or YAML file with upstream's fields, and `paths` as a list of choices if they
    are not to be sampled; unset: the published configuration. The networks that a file of
    AttentiveNAS evaluates are the paths, unless their number is stated. Raises `DataError`,
    `ConfigError` or `BundleError` naming what does not fit.
    """
    tensors = read_weights(checkpoint)
    fields = dict(released_config(family, tensors) if config is None else read_fields(config))
    listed = fields.pop("paths", None)
    if listed is not None and paths is not None:
        raise ConfigError(f"paths: expected a number or the list in {config}, got both")
    if listed is not None and not isinstance(listed, list):
        raise ConfigError(f"config.paths: expected a list, got {type(listed).__name__}")
    if listed is None and paths is None and family == "attentivenas":
        listed = published_paths(fields)
    chosen = DEFAULT_PATHS if paths is None else paths
    ours = read_nested(family, fields, chosen if listed is None else listed, seed)
    model = import_nested(family, ours, tensors)
    origin = f"{checkpoint.name}, a supernet in the layout {family}"
    write_bundle(into, build_manifest(ours, info, origin), model)
    return model

"""A PEFT adapter as a further path of a bundle; the base weights are shared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.progress import Progress
from safetensors.torch import save_file

from ladderstitch.errors import ConfigError
from ladderstitch.scheduling.profiles import QualityTable
from ladderstitch.text.bundle import QUALITY, TextBundle
from ladderstitch.text.hugging_face.adapter import lay_out, read_adapter
from ladderstitch.text.manifest import TextManifest, TextVariant, write_manifest
from ladderstitch.text.model.layout import LaidOutWeights
from ladderstitch.text.model.weight_reader import check_delta
from ladderstitch.text.model.weights import expected_shapes
from ladderstitch.training.text.calibrate import Sample, calibrate


def add_adapter(
    bundle: TextBundle,
    adapter: Path,
    name: str,
    text: Path | None,
    sample: Sample,
    progress: Progress,
) -> QualityTable | None:
    """Add an adapter to a bundle as the path `name`, for requests that name it.

    With a held-out text, all paths are measured. A bundle whose paths have qualities needs one. The
    path has the residual scheme of the first one. Raises `BundleError` if the adapter does not fit
    the model, `ConfigError` if the path exists or the text is missing.
    """
    manifest = bundle.manifest
    if text is None and (bundle.path / QUALITY).exists():
        raise ConfigError(f"text: expected a held-out text, as {bundle.path / QUALITY} exists")
    if name in {variant.name for variant in manifest.variants}:
        raise ConfigError(f"name: expected one that the bundle lacks, got {name!r}")
    weights = LaidOutWeights(bundle.open_files(), manifest.layout, manifest.config)
    delta = lay_out(read_adapter(adapter), weights)
    check_delta(delta, expected_shapes(manifest.config, shared_norm=bundle.shared_norm))
    path = TextVariant(
        name=name,
        residual=manifest.variants[0].residual,
        delta=f"{name}.safetensors",
        by_name=True,
    )
    fields = manifest.model_dump() | {"paths": (*manifest.variants, path)}
    extended = replace(bundle, manifest=TextManifest.model_validate(fields))
    save_file(delta, bundle.path / f"{name}.safetensors")
    table = calibrate(extended, text, sample, 1, progress) if text is not None else None
    write_manifest(bundle.path, extended.manifest)
    return table

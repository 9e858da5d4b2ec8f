"""A PEFT adapter as a further path of a bundle; the base weights are shared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.progress import Progress
from safetensors.torch import save_file

from ladderstitch.errors import ConfigError
from ladderstitch.scheduling.profiles import QualityTable
from ladderstitch.text.bundle import TextBundle, TextManifest, TextVariant, write_manifest
from ladderstitch.text.hugging_face.adapter import read_adapter
from ladderstitch.text.model.layout import LaidOutWeights
from ladderstitch.text.model.weight_reader import DOWN, UP, check_delta
from ladderstitch.text.model.weights import expected_shapes
from ladderstitch.training.text.calibrate import Sample, calibrate


def add_adapter(
    bundle: TextBundle, adapter: Path, name: str, text: Path, sample: Sample, progress: Progress
) -> QualityTable:
    """Add an adapter to a bundle as the path `name`, and measure all paths on a held-out text.

    The path has the residual scheme of the first one. Raises `BundleError` if the adapter does not
    fit the model, `ConfigError` if the path exists or the layout does not allow it.
    """
    manifest = bundle.manifest
    if name in {variant.name for variant in manifest.variants}:
        raise ConfigError(f"name: expected one that the bundle lacks, got {name!r}")
    delta = read_adapter(adapter)
    check_delta(delta, expected_shapes(manifest.config, shared_norm=bundle.shared_norm))
    weights = LaidOutWeights(bundle.open_files(), manifest.layout, manifest.config)
    if changed := sorted(n for n in delta if not weights.is_as_stored(_tensor_of(n))):
        raise ConfigError(
            f"adapter: expected tensors that this model reads as they are stored, got {changed[0]}"
        )
    path = TextVariant(
        name=name, residual=manifest.variants[0].residual, delta=f"{name}.safetensors"
    )
    fields = manifest.model_dump() | {"paths": (*manifest.variants, path)}
    extended = replace(bundle, manifest=TextManifest.model_validate(fields))
    save_file(delta, bundle.path / f"{name}.safetensors")
    table = calibrate(extended, text, sample, 1, progress)
    write_manifest(bundle.path, extended.manifest)
    return table


def _tensor_of(factor: str) -> str:
    return factor.removesuffix(UP).removesuffix(DOWN)

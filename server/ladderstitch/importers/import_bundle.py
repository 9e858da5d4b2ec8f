"""Bundles from checkpoints of other projects: stitched families, or anchors to be stitched."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter, ValidationError

from ladderstitch.errors import ConfigError, DataError
from ladderstitch.importers.checkpoints import read_weights
from ladderstitch.importers.stitched_families import import_model, read_config
from ladderstitch.importers.vision_anchors import PretrainedAnchor, load_anchor
from ladderstitch.training.vision.dataset import find_photographs, random_views
from ladderstitch.training.vision.stitch import assemble_family
from ladderstitch.vision.bundle import Preprocessing, VisionManifest, write_bundle
from ladderstitch.vision.models.families import FamilyConfig
from ladderstitch.vision.models.nested.model import NestedConfig
from ladderstitch.vision.models.resnet import ResNetConfig
from ladderstitch.vision.models.stitched import StitchedModel
from ladderstitch.vision.models.swin import SwinConfig
from ladderstitch.vision.models.vit import VitConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
VIEWS_EACH = 4

_DEIT = {"image_size": 224, "num_classes": 1000, "patch_size": 16}
_SWIN = [(96, [2, 2, 6, 2], [3, 6, 12, 24]), (96, [2, 2, 18, 2], [3, 6, 12, 24])]
_SWIN.append((128, [2, 2, 18, 2], [4, 8, 16, 32]))
RELEASED_CONFIGS: dict[str, Mapping[str, Any]] = {
    "snnet-deit": _DEIT
    | {
        "kernel_size": 2,
        "stride": 1,
        "anchors": [{"embed_dim": d, "depth": 12, "num_heads": d // 64} for d in (192, 384, 768)],
    },
    "snnet-swin": {
        "image_size": 224,
        "num_classes": 1000,
        "window_size": 7,
        "anchors": [{"embed_dim": d, "depths": b, "num_heads": h} for d, b, h in _SWIN],
    },
    "snnet-resnet": {
        "image_size": 224,
        "num_classes": 1000,
        "anchors": [
            {"kind": "resnet", "width": 64, "depths": [2, 2, 2, 2], "block": "BasicBlock"},
            {"kind": "resnet", "width": 64, "depths": [3, 4, 6, 3], "block": "Bottleneck"},
        ],
    },
    "snnetv2": _DEIT
    | {
        "anchors": [
            {"embed_dim": 384, "depth": 12, "num_heads": 6},
            {"embed_dim": 1024, "depth": 24, "num_heads": 16},
        ],
    },
}
"""Configurations of the published checkpoints, used if the caller names only the family."""


@dataclass(frozen=True, slots=True)
class BundleInfo:
    """The name, licence, labels and preprocessing of a bundle to be written.

    `labels` is a file with one label per line. `mean` and `std` have one number per channel and
    default to ImageNet's, or to 0.5 for grey images.
    """

    name: str
    licence: str
    labels: Path | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def import_released(
    family: str, checkpoint: Path, config: Path | None, info: BundleInfo, into: Path
) -> StitchedModel:
    """Write the bundle of a stitched family's own checkpoint and return its model.

    `config` is a JSON or YAML file with upstream's fields; unset: the published configuration.
    Raises `DataError`, `ConfigError` or `BundleError` naming what does not fit.
    """
    if config is None and family not in RELEASED_CONFIGS:
        raise ConfigError(f"config: expected a file, since {family} has no published configuration")
    fields = RELEASED_CONFIGS[family] if config is None else read_fields(config)
    model = import_model(family, fields, read_weights(checkpoint))
    origin = f"{checkpoint.name}, a {family} checkpoint"
    write_bundle(into, build_manifest(read_config(family, fields), info, origin), model)
    return model


def import_anchors(
    checkpoints: Sequence[Path],
    photographs: Path | None,
    info: BundleInfo,
    into: Path,
    *,
    image_size: int | None = None,
) -> StitchedModel:
    """Write the bundle of a family made from anchors, smallest first, and return its model.

    Stitching layers are fitted on the photographs. Raises `DataError`, `ConfigError` or
    `BundleError` naming what does not fit.
    """
    anchors = [load_anchor(path, image_size=image_size) for path in checkpoints]
    if len(anchors) > 1 and photographs is None:
        raise DataError("images: expected a folder of photographs to fit the stitching layers on")
    config = family_of(anchors)
    origin = " + ".join(path.name for path in checkpoints)
    if photographs is not None and len(anchors) > 1:
        origin += f", stitched by least squares on photographs of {photographs.name}"
    manifest = build_manifest(config, info, origin)
    views = torch.empty(0)
    if photographs is not None:
        paths = find_photographs(photographs)
        views = random_views(paths, manifest.preprocessing, VIEWS_EACH, seed=0)
    model = assemble_family(config, [anchor.build().state_dict() for anchor in anchors], views)
    write_bundle(into, manifest, model)
    return model


def family_of(anchors: Sequence[PretrainedAnchor]) -> FamilyConfig:
    """Return the family in which these anchors can be stitched.

    Raises `ConfigError` if there is none.
    """
    inputs = anchors[0].inputs
    for anchor in anchors[1:]:
        if anchor.inputs != inputs:
            raise ConfigError(f"anchors: expected all to take {inputs}, got {anchor.inputs}")
    configs = [anchor.config for anchor in anchors]
    fields: dict[str, Any] = {"inputs": inputs, "anchors": configs}
    if all(isinstance(config, VitConfig) for config in configs):
        depths = [config.depth for config in configs if isinstance(config, VitConfig)]
        if len(set(depths)) > 1:
            fields |= {"family": "snnetv2"}
        else:
            fields |= {"final_norm_on_stitches": True}
    elif all(isinstance(config, SwinConfig | ResNetConfig) for config in configs):
        stages = (0, 1, 2) if isinstance(configs[0], SwinConfig) else (1, 2)
        fields |= {"family": "snnet-staged", "stages": stages}
    else:
        kinds = [type(config).__name__.removesuffix("Config") for config in configs]
        raise ConfigError(f"anchors: expected transformers, or hierarchical networks, got {kinds}")
    try:
        adapter: TypeAdapter[FamilyConfig] = TypeAdapter(FamilyConfig)
        return adapter.validate_python(fields)
    except ValidationError as error:
        raise ConfigError(f"anchors: {error}") from error


def read_fields(path: Path) -> Mapping[str, Any]:
    """Return the fields of a JSON or YAML file; raises `ConfigError` if it cannot be read."""
    text = _read_text(path)
    try:
        fields = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: expected fields, got {type(fields).__name__}")
    return fields


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def build_manifest(
    config: FamilyConfig | NestedConfig, info: BundleInfo, origin: str
) -> VisionManifest:
    """Return the manifest of a family; raises `ConfigError` for what does not fit."""
    inputs = config.inputs
    labels: Sequence[str] = [f"class {i}" for i in range(inputs.num_classes)]
    if info.labels is not None:
        labels = _read_text(info.labels).splitlines()
    grey = inputs.in_channels == 1
    try:
        return VisionManifest(
            name=info.name,
            family=config.family,
            config=config,
            labels=tuple(labels),
            preprocessing=Preprocessing.model_validate(
                {
                    "channels": inputs.in_channels,
                    "height": inputs.image_size,
                    "width": inputs.image_size,
                    "mean": info.mean or ((0.5,) if grey else IMAGENET_MEAN),
                    "std": info.std or ((0.5,) if grey else IMAGENET_STD),
                    "resize": "bicubic",
                    "crop": None if grey else 0.875,
                }
            ),
            origin=origin,
            licence=info.licence,
        )
    except ValidationError as error:
        raise ConfigError(f"bundle: {error}") from error

"""Preprocessing and labels of a network, from the configuration files of its own library.

`preprocessor_config.json` and `config.json` of transformers and `config.json` of timm are read if
they are next to the model; files that begin with the model's name (`small.config.json`) come first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ladderstitch.bundles.files import read_json
from ladderstitch.errors import ConfigError

Resize = Literal["bilinear", "bicubic"]
RESAMPLING: dict[object, Resize] = {2: "bilinear", 3: "bicubic"}
RESAMPLING |= {"bilinear": "bilinear", "bicubic": "bicubic"}
"""Interpolations that servers have, by Pillow's numbers and timm's names."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_CROP = 0.875
WHOLE = "whole"
"""The value of `crop` for images that are stretched, not cropped."""


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """What is known about a network's images and labels; None where nothing is known.

    `size` is height and width in pixels, `crop` the share of the shorter side that is kept or
    `whole`. `source` names where the settings come from.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop: float | str | None = None
    resize: Resize | None = None
    labels: tuple[str, ...] | None = None
    source: str = "defaults"

    def over(self, other: ImageSettings) -> ImageSettings:
        """Return these settings, completed by others where nothing is known."""
        names = ("size", "mean", "std", "crop", "resize", "labels")
        known = {n: v for n in names if (v := getattr(self, n)) is not None}
        source = self.source if known else other.source
        return replace(other, **known, source=source)

    def preprocessing(self, shape: tuple[int, int, int]) -> dict[str, Any]:
        """Return the fields of a bundle's preprocessing for images of this shape [C, H, W]."""
        channels, height, width = shape
        grey = channels == 1
        crop = self.crop if self.crop is not None else (WHOLE if grey else DEFAULT_CROP)
        return {
            "channels": channels,
            "height": height,
            "width": width,
            "mean": self.mean or ((0.5,) if grey else IMAGENET_MEAN),
            "std": self.std or ((0.5,) if grey else IMAGENET_STD),
            "resize": self.resize or "bicubic",
            "crop": None if crop == WHOLE else crop,
        }


def read_settings(model: Path) -> ImageSettings:
    """Return the settings in the files next to a model.

    Raises `ConfigError` for a step of preprocessing that servers do not have, and `BundleError` for
    files that cannot be read.
    """
    found = ImageSettings()
    for name in ("preprocessor_config.json", "config.json"):
        for path in (model.with_name(f"{model.stem}.{name}"), model.with_name(name)):
            if path.is_file():
                found = found.over(_read_file(path))
                break
    return found


def _read_file(path: Path) -> ImageSettings:
    try:
        fields = json.loads(read_json(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: expected fields, got {type(fields).__name__}")
    try:
        if path.name.endswith("preprocessor_config.json"):
            return replace(_read_processor(fields), source=str(path))
        return replace(_read_config(fields), source=str(path))
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _read_processor(fields: Mapping[str, Any]) -> ImageSettings:
    """Return the settings of an image processor of transformers."""
    settings = ImageSettings(resize=_resampling(fields.get("resample", 2)))
    if not fields.get("do_rescale", True):
        raise ValueError("do_rescale: expected true, got false")
    if abs(float(fields.get("rescale_factor", 1 / 255)) - 1 / 255) > 1e-6:
        raise ValueError(f"rescale_factor: expected 1/255, got {fields['rescale_factor']}")
    normalised = fields.get("do_normalize", True)
    mean, std = fields.get("image_mean", (0.5,) * 3), fields.get("image_std", (0.5,) * 3)
    settings = replace(
        settings,
        mean=tuple(float(v) for v in mean) if normalised else (0.0,) * len(mean),
        std=tuple(float(v) for v in std) if normalised else (1.0,) * len(std),
    )
    size = fields.get("size", 224)
    if isinstance(size, dict) and "height" in size:
        resized = (int(size["height"]), int(size["width"]))
        kept = _sides(fields["crop_size"]) if _crops(fields) else resized
        share = kept[0] / resized[0]
        return replace(settings, size=kept, crop=WHOLE if share >= 1 else share)
    edge = int(size["shortest_edge"] if isinstance(size, dict) else size)
    if "crop_pct" in fields and edge < 384:  # ConvNeXt's processor: resize, then keep `edge`
        return replace(settings, size=(edge, edge), crop=float(fields["crop_pct"] or 0.875))
    if "crop_pct" in fields:
        return replace(settings, size=(edge, edge), crop=WHOLE)
    if not _crops(fields):
        if isinstance(size, dict):
            raise ValueError("do_center_crop: expected true for a `shortest_edge`, got false")
        return replace(settings, size=(edge, edge), crop=WHOLE)
    kept = _sides(fields["crop_size"])
    return replace(settings, size=kept, crop=min(kept[0] / edge, 1.0))


def _crops(fields: Mapping[str, Any]) -> bool:
    return bool(fields.get("do_center_crop", "crop_size" in fields)) and "crop_size" in fields


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        return int(size["height"]), int(size["width"])
    return int(size), int(size)


def _read_config(fields: Mapping[str, Any]) -> ImageSettings:
    """Return the settings in a configuration of timm, or the labels in one of transformers."""
    labels = None
    names = fields.get("label_names")
    if isinstance(by_id := fields.get("id2label"), dict):
        labels = tuple(str(by_id[key]) for key in sorted(by_id, key=int))
    elif isinstance(names, list):
        labels = tuple(map(str, names))
    timm = fields.get("pretrained_cfg")
    if not isinstance(timm, dict):
        return ImageSettings(labels=labels)
    _, height, width = timm["input_size"]
    share = float(timm.get("crop_pct", DEFAULT_CROP))
    squashed = timm.get("crop_mode") == "squash"
    return ImageSettings(
        size=(int(height), int(width)),
        mean=tuple(map(float, timm["mean"])),
        std=tuple(map(float, timm["std"])),
        crop=WHOLE if squashed else share,
        resize=_resampling(timm.get("interpolation", "bicubic")),
        labels=labels,
    )


def _resampling(value: object) -> Resize:
    if value not in RESAMPLING:
        known = ", ".join(str(key) for key in RESAMPLING)
        raise ValueError(f"interpolation: expected one of {known}, got {value}")
    return RESAMPLING[value]

"""The variants of a bundle as records, for the commands that write or measure one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ladderstitch.bundles import is_language_bundle
from ladderstitch.cli.output import Record, print_json

if TYPE_CHECKING:
    from ladderstitch.scheduling.profiles import LatencyProfile, QualityTable


def print_bundle(path: Path, **fields: object) -> None:
    """Print a bundle with its variants as a JSON document that has these fields, too."""
    print_json({"bundle": str(path), **fields, "variants": variant_records(path)})


def variant_records(path: Path) -> list[Record]:
    """Return the usable variants of a bundle by their ids; their quality is None if not measured.

    Raises `BundleError` if the bundle is not valid.
    """
    names, table = _read_bundle(path)
    measured = {} if table is None else table.variants
    records: list[Record] = []
    for variant, name in names.items():
        quality = measured.get(variant)
        records.append(
            {
                "variant": variant,
                "name": name,
                "quality": None if quality is None else quality.value,
                "low": None if quality is None else quality.low,
                "high": None if quality is None else quality.high,
                "quality_metric": None if table is None else table.metric,
            }
        )
    return records


def latency_records(path: Path, profile: LatencyProfile) -> list[Record]:
    """Return the measured seconds of compute of every variant and batch size.

    The batch size of a language model is the number of tokens of a step.
    """
    names, _ = _read_bundle(path)
    return [
        {
            "variant": variant,
            "name": names[variant],
            "batch_size": size,
            "median_s": latency.median_s[place],
            "p99_s": latency.p99_s[place],
        }
        for variant, latency in sorted(profile.variants.items())
        for place, size in enumerate(profile.batch_sizes)
    ]


def quality_records(names: Sequence[str], table: QualityTable) -> list[Record]:
    """Return the qualities of a language model's paths, by their names in order of their ids."""
    return [
        {
            "variant": number,
            "name": name,
            "quality": table.variants[number].value,
            "low": table.variants[number].low,
            "high": table.variants[number].high,
            "quality_metric": table.metric,
            "perplexity": table.variants[number].perplexity,
        }
        for number, name in enumerate(names)
    ]


def _read_bundle(path: Path) -> tuple[Mapping[int, str], QualityTable | None]:
    """Return the names of the usable variants of a bundle by their ids, and its qualities."""
    if is_language_bundle(path):
        from ladderstitch.text.bundle import QUALITY, TextBundle

        text = TextBundle.load(path, calibrated=(path / QUALITY).exists())
        return dict(enumerate(v.name for v in text.manifest.variants)), text.quality
    from ladderstitch.vision.bundle import VisionBundle

    image = VisionBundle.load(path)
    return {v.id: v.name for v in image.manifest.variants() if v.usable}, image.quality

"""The models as the page draws them: variants with this machine's latencies, example inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ladderstitch.errors import InvalidArgument
from ladderstitch.hosting.registry import LoadedModel, ModelRegistry, TextModel, VisionModel
from ladderstitch.runtime.device import device_name

EXAMPLES = "examples"
"""Folder of a bundle with images to try it with."""
EXAMPLE_SUFFIXES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
MAX_EXAMPLES = 24

Body = dict[str, Any]


def describe_models(registry: ModelRegistry) -> Body:
    """Return all models in order of their names, and the replica that hosts them."""
    models = registry.models_by_name.values() if registry.ready else ()
    return {
        "replica": registry.replica,
        "serving": registry.serving,
        "models": [_describe(model) for model in models],
    }


def example_images(model: VisionModel) -> dict[str, Path]:
    """Return the example images of a model's bundle by name."""
    if not model.bundle.manifest.takes_images:
        return {}
    folder = model.bundle.path / EXAMPLES
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {f.name: f for f in files if f.suffix.lower() in EXAMPLE_SUFFIXES}


def example_image(model: VisionModel, name: str) -> Path:
    """Return an example image of a model; raises `InvalidArgument` for an unknown name."""
    images = example_images(model)
    if name not in images:
        expected = f"one of {', '.join(images)}" if images else "none, the model has no examples"
        raise InvalidArgument("example", f"expected {expected}, got {name[:80]!r}")
    return images[name]


def _describe(model: LoadedModel) -> Body:
    return _describe_text(model) if isinstance(model, TextModel) else _describe_vision(model)


def _describe_vision(model: VisionModel) -> Body:
    """Return an image model; the latencies were measured at the start, one image at a time."""
    table, planner = model.bundle.quality, model.scheduler.planner
    assert table is not None, "a replica hosts only calibrated bundles"
    profile = planner.latency.profile
    return {
        "name": model.name,
        "version": model.version,
        "kind": "images" if model.bundle.manifest.takes_images else "tensors",
        "device": profile.device,
        "threads": profile.threads,
        "quality_metric": table.metric,
        "quality_data": table.data,
        "frontier": planner.candidates.frontier,
        "examples": list(example_images(model))[:MAX_EXAMPLES],
        "variants": [
            {
                "id": variant,
                "name": stitch.name,
                "precision": stitch.precision,
                "quality": table.variants[variant].value,
                "latency_ms": 1e3 * profile.alone_s(variant),
                "stages": [_stage(s.anchor, s.first, s.last) for s in stitch.segments],
            }
            for variant, stitch in sorted(model.variants.items())
            if variant in table.variants
        ],
    }


def _describe_text(model: TextModel) -> Body:
    """Return a language model; the latencies were measured at the start, one stream at a time."""
    table, profile = model.bundle.quality, model.scheduler.times.latency.profile
    return {
        "name": model.name,
        "version": model.version,
        "kind": "text",
        "device": _name_device(profile.device),
        "threads": profile.threads,
        "quality_metric": table.metric if table else "",
        "quality_data": table.data if table else "",
        "frontier": model.scheduler.candidates.frontier,
        "max_tokens": model.scheduler.max_tokens,
        "variants": [
            {
                "id": number,
                "name": variant.name,
                "precision": variant.precision or "",
                "quality": table.value(number) if table else None,
                "latency_ms": 1e3 * profile.alone_s(number),
                "stages": [_stage(r.anchor, r.first, r.last) for r in variant.route],
            }
            for number, variant in enumerate(model.bundle.manifest.variants)
        ],
    }


def _name_device(device: str) -> str:
    """Return the processor's name; of a GPU its number, because the ranks alone have opened it."""
    return device_name(torch.device(device)) if device == "cpu" else device


def _stage(anchor: int, first: int, last: int) -> Body:
    return {"anchor": anchor, "first": first, "last": last}

"""Checks of imported supernets against recorded outputs of the original implementations.

Every recorded sub-net is one path: its logits with the supernet's statistics of batch
normalisation, and with those that are recalibrated on the recorded batches, which are compared
themselves, too. Of networks that stop when they are sure, the stages' entropies and the stage of
every image are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ladderstitch.importers.nested_families import import_nested, read_nested
from ladderstitch.vision.models.executor import StitchExecutor
from ladderstitch.vision.models.nested.model import NestedModel
from ladderstitch.vision.models.nested.thinking_vit import ThinkingVitPath, exit_entropy

Tensors = Mapping[str, Tensor]
Pair = tuple[str, Tensor, Tensor]
"""An item with our tensor and the recorded one."""

STATISTICS_RTOL = 1e-4
"""Allowed difference of recalibrated statistics, relative to the largest of a layer."""
NOT_FIELDS = ("id", "kind", "params")
"""Fields of a recorded id that are not part of the choice of a path."""


def compare_nested(
    metadata: Mapping[str, Any], tensors: Tensors, weights: Tensors
) -> tuple[dict[str, float], list[str]]:
    """Return the relative error of every item, and the items outside the tolerance."""
    entries = [entry for entry in metadata["ids"] if entry.get("kind", "stage") == "stage"]
    fields = [
        {"name": entry["id"]} | {k: v for k, v in entry.items() if k not in NOT_FIELDS}
        for entry in entries
    ]
    config = read_nested(metadata["family"], metadata["config"], fields)
    model = import_nested(metadata["family"], config, weights)
    atol = metadata["tolerance"]["suggested_atol"]
    errors: dict[str, float] = {}
    wrong: list[str] = []
    with torch.inference_mode():
        pairs = [*_outputs(model, tensors), *_exits(model, metadata, tensors)]
        for item, got, wanted in pairs:
            errors[item] = float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9))
            bound = atol
            if ".running_" in item:
                bound = STATISTICS_RTOL * float(wanted.abs().max())
            if not torch.allclose(got, wanted, atol=bound, rtol=0):
                wrong.append(item)
    recorded = {name.removeprefix("output.") for name in tensors if name.startswith("output.")}
    return errors, wrong + sorted(recorded - errors.keys())


def _outputs(model: NestedModel, tensors: Tensors) -> Iterator[Pair]:
    """Yield the logits of every path, then those after recalibration and the statistics."""
    images = tensors["input"]
    batches = [tensors[name] for name in sorted(tensors) if name.startswith("calibration.")]
    serving = StitchExecutor(model)
    for stitch in model.stitches:
        name = stitch.given_name
        yield name, serving(images, stitch.id), tensors[f"output.{name}"]
    if not batches:
        return
    for stitch in model.stitches:
        model.recalibrate(stitch.id, batches)
    serving = StitchExecutor(model)
    for stitch in model.stitches:
        name = stitch.given_name
        wanted = tensors[f"output.{name}.recalibrated"]
        yield f"{name}.recalibrated", serving(images, stitch.id), wanted
        for norm, (mean, variance) in model.statistics[stitch.id].items():
            for part, got in (("running_mean", mean), ("running_var", variance)):
                yield f"{name}.{norm}.{part}", got, tensors[f"recalibrated.{name}.{norm}.{part}"]


def _exits(model: NestedModel, metadata: Mapping[str, Any], tensors: Tensors) -> Iterator[Pair]:
    """Yield entropies, stages and logits of networks that stop when they are sure."""
    paths_of = enumerate(model.config.net.paths)
    stages = {n: path.stages for n, path in paths_of if isinstance(path, ThinkingVitPath)}
    for entry in metadata["ids"]:
        if entry.get("kind") != "threshold":
            continue
        paths = {
            stitch.given_name: stitch.id
            for stitch in model.stitches
            if stages.get(stitch.id) == tuple(entry["stages"])
        }
        logits = [model(tensors["input"], path) for _, path in sorted(paths.items())]
        entropies = [exit_entropy(stage) for stage in logits]
        yield "entropy.0", entropies[0], tensors["entropy.0"]
        exits = torch.full((len(logits[0]),), len(logits) - 1)
        for stage in reversed(range(len(logits) - 1)):
            exits[entropies[stage] < entry["threshold"]] = stage
        name = entry["id"]
        yield f"exit.{name}", exits.float(), tensors[f"exit.{name}"].float()
        chosen = torch.stack(logits)[exits, torch.arange(len(exits))]
        yield name, chosen, tensors[f"output.{name}"]

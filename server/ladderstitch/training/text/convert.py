"""A standard language model becomes a family: itself, and ladders that were retrained."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor

from ladderstitch.errors import ConfigError
from ladderstitch.scheduling.profiles import Quality, QualityTable
from ladderstitch.text.bundle import TextBundle, TextManifest, TextVariant, write_manifest
from ladderstitch.text.model.residual import ResidualScheme, plan_layers
from ladderstitch.text.model.weights import expected_shapes
from ladderstitch.training.text.distil import (
    Distillation,
    LadderRecipe,
    adapt,
    delta_tensors,
    distil,
    prepare,
)
from ladderstitch.training.text.evaluate import CONFIDENCE, measure_path, tokenise, windows
from ladderstitch.training.text.trainable_llama import LowRank, TrainableLlama

METRIC = "next-token accuracy"
STANDARD = "standard"


@dataclass(frozen=True, slots=True)
class Conversion:
    """From `source`, by a recipe, on a text; measured on held-out texts by name, of which the
    first is what the bundle's qualities come from."""

    source: TextBundle
    recipe: LadderRecipe
    text: Path
    held_out: Mapping[str, Path]
    into: Path
    work: Path


def convert(conversion: Conversion, progress: Progress) -> dict[str, object]:
    """Write the bundle `into`; what was measured, before and after. Resumes where `work` stands.

    Raises `ConfigError` for a source that is no standard model, `DataError` for a text.
    """
    source, recipe = conversion.source, conversion.recipe
    config, started = source.manifest.config, time.monotonic()
    if source.manifest.ways[0].residual.scheme != STANDARD:
        raise ConfigError("source: expected a bundle whose first path is a standard model")
    if recipe.ladder_layers > config.layers:
        raise ConfigError(f"ladder_layers: expected at most {config.layers}")
    tokenizer = source.tokenizer()
    weights = source.weights()
    tensors = {name: weights.read(name).float() for name in expected_shapes(config)}
    adapters = adapt(
        expected_shapes(config),
        range(config.layers - recipe.ladder_layers, config.layers),
        recipe.rank,
        recipe.seed,
    )
    conversion.work.mkdir(parents=True, exist_ok=True)
    text = windows(
        tokenise(conversion.text, tokenizer),
        recipe.window,
        recipe.tokens // recipe.window,
        recipe.seed,
    )
    _train(conversion, tensors, adapters, text, progress)
    held_out = {
        name: windows(
            tokenise(file, tokenizer),
            recipe.held_out_window,
            recipe.held_out_tokens // recipe.held_out_window,
            recipe.seed,
        )
        for name, file in conversion.held_out.items()
    }
    measured = _measure(conversion, TrainableLlama(config, tensors), adapters, held_out, progress)
    _write(conversion, adapters, measured)
    return {
        "recipe": recipe.model_dump(mode="json"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__},
        "trained_tokens": text[:, 1:].numel() * recipe.epochs,
        "seconds": round(time.monotonic() - started),
        "held_out": {name: w[:, 1:].numel() for name, w in held_out.items()},
        "paths": {
            data: {path: quality.model_dump() for path, quality in paths.items()}
            for data, paths in measured.items()
        },
    }


def _train(
    conversion: Conversion,
    tensors: Mapping[str, Tensor],
    adapters: Mapping[str, LowRank],
    text: Tensor,
    progress: Progress,
) -> None:
    config, recipe = conversion.source.manifest.config, conversion.recipe
    halved = {name: t.bfloat16() if t.dim() > 1 else t for name, t in tensors.items()}
    plans = plan_layers(_ladder(recipe.ladder_layers), config.layers, 1)
    model = TrainableLlama(config, halved)
    work = Distillation(model, plans, adapters, recipe, conversion.work)
    distil(work, prepare(work, text, progress), progress)


def _measure(
    conversion: Conversion,
    model: TrainableLlama,
    adapters: Mapping[str, LowRank],
    held_out: Mapping[str, Tensor],
    progress: Progress,
) -> dict[str, dict[str, Quality]]:
    """By data set and path: standard, untrained ladders, the retrained one."""
    recipe, layers = conversion.recipe, conversion.source.manifest.config.layers
    untrained = sorted({*recipe.untrained, recipe.ladder_layers})
    paths: dict[str, tuple[ResidualScheme, Mapping[str, LowRank] | None]] = {
        STANDARD: (ResidualScheme(), None)
    }
    paths |= {f"ladder-{n}, untrained": (_ladder(n), None) for n in untrained}
    paths[recipe.name] = (_ladder(recipe.ladder_layers), adapters)
    total = sum(len(windows) for windows in held_out.values()) * len(paths)
    task = progress.add_task("measuring", total=total)
    return {
        data: {
            name: measure_path(
                model,
                plan_layers(residual, layers, 1),
                added,
                text,
                lambda n: progress.advance(task, n),
            )
            for name, (residual, added) in paths.items()
        }
        for data, text in held_out.items()
    }


def _ladder(layers: int) -> ResidualScheme:
    return ResidualScheme(scheme="ladder", ladder_layers=layers)


def _write(
    conversion: Conversion,
    adapters: Mapping[str, LowRank],
    measured: Mapping[str, Mapping[str, Quality]],
) -> None:
    """The bundle: the source's weights, the delta, paths and their qualities."""
    source, recipe, into = conversion.source, conversion.recipe, conversion.into
    into.mkdir(parents=True, exist_ok=True)
    for file in source.path.iterdir():
        if file.name not in ("model.yaml", "quality.json"):
            shutil.copy2(file, into / file.name)
    delta = f"{recipe.name}.safetensors"
    save_file(delta_tensors(adapters), into / delta)
    path = TextVariant(name=recipe.name, residual=_ladder(recipe.ladder_layers), delta=delta)
    earlier = [way for way in source.manifest.ways if way.name != recipe.name]
    known = source.quality.variants if source.quality else {}
    by_name = {way.name: known[n] for n, way in enumerate(source.manifest.ways) if n in known}
    data = next(iter(measured))
    by_name |= measured[data]
    paths = (*earlier, path)
    table = QualityTable(
        metric=METRIC,
        data=data,
        n=recipe.held_out_tokens // recipe.held_out_window * recipe.held_out_window,
        confidence=CONFIDENCE,
        date=datetime.now(UTC).date().isoformat(),
        versions={"torch": torch.__version__},
        variants={number: by_name[way.name] for number, way in enumerate(paths)},
    )
    (into / "quality.json").write_text(table.model_dump_json(indent=1) + "\n")
    fields = source.manifest.model_dump() | {"paths": paths}
    write_manifest(into, TextManifest.model_validate(fields))


def write_report(report: Mapping[str, object], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")

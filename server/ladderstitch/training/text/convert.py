"""Convert a standard language model to a family: itself, and a retrained path of another scheme.

The other scheme is the ladder or groups.
"""

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
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.manifest import TextManifest, TextVariant, write_manifest
from ladderstitch.text.model.residual import ResidualScheme, plan_layers
from ladderstitch.text.model.weights import expected_shapes
from ladderstitch.text.tokenizer import TextTokenizer
from ladderstitch.training.text.distil import (
    ConversionRecipe,
    Distillation,
    create_adapters,
    delta_tensors,
    distil,
    prepare_targets,
)
from ladderstitch.training.text.evaluate import (
    CONFIDENCE,
    METRIC,
    measure_path,
    read_tokens,
    split_windows,
)
from ladderstitch.training.text.group_fit import fit_groups
from ladderstitch.training.text.trainable_llama import LowRank, TrainableLlama

STANDARD = "standard"


@dataclass(frozen=True, slots=True)
class Conversion:
    """The inputs of a conversion: source bundle, recipe, training text and held-out texts by name.

    The first held-out text gives the qualities of the bundle `into`. Checkpoints and targets are
    kept in the folder `work`.
    """

    source: TextBundle
    recipe: ConversionRecipe
    text: Path
    held_out: Mapping[str, Path]
    into: Path
    work: Path


def convert(conversion: Conversion, progress: Progress) -> dict[str, object]:
    """Retrain the changed layers, write the bundle `into`, and return the report.

    The report has the qualities of all paths, before and after retraining. The conversion continues
    from the state in the folder `work`. Raises `ConfigError` for a source that is not a standard
    model, and `DataError` for a text that cannot be read or is too short.
    """
    source, recipe = conversion.source, conversion.recipe
    config, started = source.manifest.config, time.monotonic()
    if source.manifest.variants[0].residual.scheme != STANDARD:
        raise ConfigError("source: expected a bundle whose first path is a standard model")
    plan_layers(recipe.residual, config.layers, 1)  # raises for layers that the model lacks
    tokenizer = source.tokenizer()
    weights = source.weights()
    tensors = {name: weights.read(name).float() for name in expected_shapes(config)}
    adapters = create_adapters(
        expected_shapes(config),
        recipe.retrained_layers(config.layers),
        recipe.rank,
        recipe.seed,
    )
    conversion.work.mkdir(parents=True, exist_ok=True)
    text = split_windows(
        read_tokens(conversion.text, tokenizer),
        recipe.window,
        recipe.tokens // recipe.window,
        recipe.seed,
    )
    _train(conversion, tensors, adapters, text, progress)
    held_out = _read_held_out(conversion, tokenizer)
    measured = _measure(conversion, TrainableLlama(config, tensors), adapters, held_out, progress)
    _write_bundle(conversion, adapters, measured)
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


def _read_held_out(conversion: Conversion, tokenizer: TextTokenizer) -> dict[str, Tensor]:
    """Return the windows [W, T + 1] of every held-out text by name."""
    recipe = conversion.recipe
    return {
        name: split_windows(
            read_tokens(file, tokenizer),
            recipe.held_out_window,
            recipe.held_out_tokens // recipe.held_out_window,
            recipe.seed,
        )
        for name, file in conversion.held_out.items()
    }


def _train(
    conversion: Conversion,
    tensors: Mapping[str, Tensor],
    adapters: Mapping[str, LowRank],
    text: Tensor,
    progress: Progress,
) -> None:
    """Train the adapters in place, on a model with bfloat16 matrices."""
    config, recipe = conversion.source.manifest.config, conversion.recipe
    halved = {name: t.bfloat16() if t.dim() > 1 else t for name, t in tensors.items()}
    plans = plan_layers(recipe.residual, config.layers, 1)
    model = TrainableLlama(config, halved)
    work = Distillation(model, plans, adapters, recipe, conversion.work)
    if recipe.fitted_tokens and not work.checkpoint.exists():
        every = max(1, recipe.tokens // recipe.fitted_tokens)  # of all parts of the text
        fit_groups(model, plans, adapters, text[::every], progress)
    if recipe.epochs:
        distil(work, prepare_targets(work, text, progress), progress)


def _measure(
    conversion: Conversion,
    model: TrainableLlama,
    adapters: Mapping[str, LowRank],
    held_out: Mapping[str, Tensor],
    progress: Progress,
) -> dict[str, dict[str, Quality]]:
    """Return the quality by data set and path: standard, untrained, retrained."""
    recipe, layers = conversion.recipe, conversion.source.manifest.config.layers
    untrained = {f"ladder-{n}, untrained": _ladder_scheme(n) for n in sorted(recipe.untrained)}
    untrained |= {f"{recipe.name}, untrained": recipe.residual}
    paths: dict[str, tuple[ResidualScheme, Mapping[str, LowRank] | None]] = {
        STANDARD: (ResidualScheme(), None)
    }
    paths |= {name: (residual, None) for name, residual in untrained.items()}
    paths[recipe.name] = (recipe.residual, adapters)
    total = sum(len(text) for text in held_out.values()) * len(paths)
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


def _ladder_scheme(layers: int) -> ResidualScheme:
    """Return the scheme whose last layers are ladder layers."""
    return ResidualScheme(scheme="ladder", ladder_layers=layers)


def _write_bundle(
    conversion: Conversion,
    adapters: Mapping[str, LowRank],
    measured: Mapping[str, Mapping[str, Quality]],
) -> None:
    """Write the bundle: the source's weights, the delta, the paths and their qualities."""
    source, recipe, into = conversion.source, conversion.recipe, conversion.into
    into.mkdir(parents=True, exist_ok=True)
    for file in source.path.iterdir():
        if file.name not in ("model.yaml", "quality.json"):
            shutil.copy2(file, into / file.name)
    delta = f"{recipe.name}.safetensors"
    save_file(delta_tensors(adapters), into / delta)
    retrained = TextVariant(name=recipe.name, residual=recipe.residual, delta=delta)
    earlier = [v for v in source.manifest.variants if v.name != recipe.name]
    known = source.quality.variants if source.quality else {}
    by_name = {v.name: known[n] for n, v in enumerate(source.manifest.variants) if n in known}
    data = next(iter(measured))
    by_name |= measured[data]
    paths = (*earlier, retrained)
    table = QualityTable(
        metric=METRIC,
        data=data,
        n=recipe.held_out_tokens // recipe.held_out_window * recipe.held_out_window,
        confidence=CONFIDENCE,
        date=datetime.now(UTC).date().isoformat(),
        versions={"torch": torch.__version__},
        variants={number: by_name[path.name] for number, path in enumerate(paths)},
    )
    (into / "quality.json").write_text(table.model_dump_json(indent=1) + "\n")
    fields = source.manifest.model_dump() | {"paths": paths}
    write_manifest(into, TextManifest.model_validate(fields))


def write_report(report: Mapping[str, object], path: Path) -> None:
    """Write the report of `convert` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")

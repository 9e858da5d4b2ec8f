"""Make a stitched language family from texts: tokenizer, anchors, stitching maps, bundle."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor

from ladderstitch.scheduling.profiles import Quality, QualityTable
from ladderstitch.text.bundle import QUALITY, TextBundle, write_tokenizer
from ladderstitch.text.manifest import TextManifest, TextVariant, write_manifest
from ladderstitch.text.model.family_weights import anchor_prefix, map_shapes
from ladderstitch.text.model.residual import plan_layers
from ladderstitch.text.model.weight_reader import SINGLE
from ladderstitch.text.tokenizer import TextTokenizer
from ladderstitch.text.tokenizer_files import TOKENIZER
from ladderstitch.training.text.calibrate import add_switches
from ladderstitch.training.text.elastic_recipe import ANCHOR_RUN, ElasticRecipe
from ladderstitch.training.text.evaluate import CONFIDENCE, METRIC, read_tokens, split_windows
from ladderstitch.training.text.family_routes import Route, all_routes
from ladderstitch.training.text.measure_family import (
    FamilyFigures,
    anchor_switches,
    loss_nats,
    path_quality,
    summarise_curve,
    summarise_paths,
)
from ladderstitch.training.text.scratch import train_schemes, train_tokenizer
from ladderstitch.training.text.stitching_maps import fit_maps, half_precision
from ladderstitch.training.text.switch_training import train_family
from ladderstitch.training.text.trainable_family import TrainableFamily

LOGGED_WINDOWS = 16
"""Held-out windows of the figures in the log."""


@dataclass(frozen=True, slots=True)
class ElasticTraining:
    """The inputs of a training: recipe, training texts, held-out text, bundle and work folder."""

    recipe: ElasticRecipe
    texts: Sequence[Path]
    held_out: Path
    into: Path
    work: Path

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the anchors, smallest first."""
        return tuple(self.recipe.anchors)

    @property
    def routes(self) -> tuple[Route, ...]:
        """All paths, by their ids."""
        return all_routes(self.recipe.family)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out windows: [W, T + 1] for losses, [W, T] for switches."""

    paths: Tensor
    switches: Tensor


def train_elastic(training: ElasticTraining, progress: Progress) -> FamilyFigures:
    """Train the family, write its bundle with all measurements, and return its figures.

    The report `elastic.json` in the folder `work` also has those of the least-squares maps.

    Every stage continues from the state in the folder `work`: `tokenizer.json`, a checkpoint of
    each anchor in the folder of its name, and `family` with that of the paths. Raises `DataError`
    for a text that cannot be read or is too short.
    """
    recipe, work, started = training.recipe, training.work, time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = _open_tokenizer(training)
    texts = [read_tokens(text, tokenizer) for text in training.texts]
    held_out = _held_out(training, tokenizer)
    family = _assemble(training, texts, held_out, progress)
    torch.set_num_threads(recipe.stitching.threads)
    windows = _windows(texts, recipe.stitching.window)
    untrained = _fit(training, family, windows, held_out, progress)
    train_family(
        family,
        recipe.stitching,
        recipe.seed,
        windows,
        work / "family",
        partial(_log_figures, training, held_out),
        progress,
    )
    stored = half_precision(family.tensors)
    measured_family = _family(recipe, {name: tensor.float() for name, tensor in stored.items()})
    qualities, figures = _measure(training, measured_family, held_out, progress)
    _write_bundle(training, stored, qualities, held_out)
    bundle = TextBundle.load(training.into)
    add_switches(bundle, training.held_out, recipe.stitching.threads, progress)
    report: dict[str, object] = {
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
        "parameters": sum(tensor.numel() for tensor in stored.values()),
        "text_tokens": sum(len(text) for text in texts),
        "held_out_tokens": held_out.paths[:, 1:].numel(),
        "least_squares": untrained.model_dump(),
        "trained": figures.model_dump(exclude={"explained_variance"}),
        "seconds_of_this_call": round(time.monotonic() - started),
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__},
    }
    (work / "elastic.json").write_text(json.dumps(report, indent=1) + "\n")
    return figures


def _open_tokenizer(training: ElasticTraining) -> TextTokenizer:
    """Return the tokenizer of the work folder, trained on the texts if there is none."""
    file = training.work / TOKENIZER
    if not file.exists():
        train_tokenizer(training.texts, training.recipe.sizes.vocab_size).save(str(file))
    return TextTokenizer.load(file)


def _windows(texts: Sequence[Tensor], length: int) -> Tensor:
    """Return the windows [W, length + 1] of texts; none crosses the end of a text."""
    return torch.cat([split_windows(text, length) for text in texts])


def _held_out(training: ElasticTraining, tokenizer: TextTokenizer) -> HeldOut:
    recipe, tokens = training.recipe, read_tokens(training.held_out, tokenizer)
    window = recipe.training.window
    switched = recipe.switch.context + recipe.switch.tokens
    return HeldOut(
        split_windows(tokens, window, recipe.held_out_tokens // window),
        split_windows(tokens, switched, recipe.switch.windows)[:, :switched],
    )


def _assemble(
    training: ElasticTraining, texts: Sequence[Tensor], held_out: HeldOut, progress: Progress
) -> TrainableFamily:
    """Train the anchors; return the family with maps of zeros."""
    recipe = training.recipe
    torch.set_num_threads(recipe.training.threads)
    windows = _windows(texts, recipe.training.window)
    tensors: dict[str, Tensor] = {}
    for number, name in enumerate(training.names):
        runs = train_schemes(
            recipe.anchor_recipe(name), windows, held_out.paths, training.work / name, progress
        )
        prefix = anchor_prefix(number, len(training.names))
        trained = runs[ANCHOR_RUN].model.tensors
        tensors |= {prefix + key: tensor.detach().clone() for key, tensor in trained.items()}
    shapes = map_shapes(recipe.family)
    tensors |= {name: torch.zeros(shape) for name, shape in shapes.items()}
    return _family(recipe, tensors)


def _family(recipe: ElasticRecipe, tensors: Mapping[str, Tensor]) -> TrainableFamily:
    plans = plan_layers(recipe.residual, recipe.family.deepest, 1)
    return TrainableFamily(recipe.configs, tensors, plans)


def _fit(
    training: ElasticTraining,
    family: TrainableFamily,
    windows: Tensor,
    held_out: HeldOut,
    progress: Progress,
) -> FamilyFigures:
    """Fit the maps in place; return their figures, which are kept in `least-squares.json`."""
    recipe, file = training.recipe, training.work / "family" / "least-squares.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    count = max(1, recipe.stitching.fit_tokens // recipe.stitching.window)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(recipe.seed))
    chosen = windows[order[:count], :-1]
    task = progress.add_task("least squares", total=len(chosen))
    explained = fit_maps(family, chosen, lambda n: progress.advance(task, n))
    if file.exists():
        return FamilyFigures.model_validate_json(file.read_text())
    found = _measure(training, family, held_out, progress)[1]
    shares = {name: round(share, 4) for name, share in explained.items()}
    found = found.model_copy(update={"explained_variance": shares})
    file.write_text(found.model_dump_json(indent=1) + "\n")
    return found


def _measure(
    training: ElasticTraining, family: TrainableFamily, held_out: HeldOut, progress: Progress
) -> tuple[dict[Route, Quality], FamilyFigures]:
    """Return the quality of every path, and the figures of the family."""
    names, routes = training.names, training.routes
    task = progress.add_task("measuring", total=len(routes) + len(names) * (len(names) - 1))

    def advance(steps: int) -> None:
        progress.advance(task, steps)

    qualities = {}
    for route in routes:
        qualities[route] = path_quality(family, route, held_out.paths)
        advance(1)
    curves = anchor_switches(family, names, held_out.switches, training.recipe.switch, advance)
    switches = {name: summarise_curve(curve) for name, curve in curves.items()}
    paths = summarise_paths(qualities, names)
    return qualities, FamilyFigures(paths=paths, switches=switches)


def _log_figures(
    training: ElasticTraining, held_out: HeldOut, family: TrainableFamily
) -> dict[str, float]:
    """Return losses of the anchors and of the middle paths, and divergences, for the log."""
    recipe, names = training.recipe, training.names
    figures: dict[str, float] = {}
    for route in training.routes:
        if not route.is_stitched or _is_middle(route, recipe):
            quality = path_quality(family, route, held_out.paths[:LOGGED_WINDOWS])
            figures[f"{route.name(names)} loss"] = round(loss_nats(quality), 4)
    windows = held_out.switches[:LOGGED_WINDOWS]
    for switch, curve in anchor_switches(family, names, windows, recipe.switch).items():
        figures[f"{switch} divergence"] = round(fmean(curve), 5)
    return figures


def _is_middle(route: Route, recipe: ElasticRecipe) -> bool:
    """Return whether a stitched path is the middle one of those with its anchors."""
    changes = recipe.family.changes(route.front, route.end)
    return (route.run, route.layer) == changes[(len(changes) + 1) // 2 - 1]


def _write_bundle(
    training: ElasticTraining,
    tensors: Mapping[str, Tensor],
    qualities: Mapping[Route, Quality],
    held_out: HeldOut,
) -> None:
    """Write the bundle: manifest, weights, tokenizer and the quality of every path."""
    into, manifest = training.into, _manifest(training)
    write_manifest(into, manifest)
    save_file(dict(tensors), into / SINGLE)
    write_tokenizer(into, training.work / TOKENIZER, manifest)
    table = QualityTable(
        metric=METRIC,
        data=training.held_out.name,
        n=held_out.paths[:, 1:].numel(),
        confidence=CONFIDENCE,
        date=datetime.now(UTC).date().isoformat(),
        versions={"torch": torch.__version__},
        variants={number: qualities[route] for number, route in enumerate(training.routes)},
    )
    (into / QUALITY).write_text(table.model_dump_json(indent=1) + "\n")


def _manifest(training: ElasticTraining) -> TextManifest:
    recipe = training.recipe
    *smaller, largest = recipe.configs
    paths = [
        TextVariant(
            name=route.name(training.names),
            residual=recipe.residual,
            route=route.segments(recipe.family),
        )
        for route in training.routes
    ]
    return TextManifest(
        name=recipe.name,
        config=largest,
        anchors=tuple(smaller),
        residual=recipe.residual,
        paths=tuple(paths),
        end_tokens=(0,),
        origin="trained from scratch: " + ", ".join(text.name for text in training.texts),
        licence=recipe.licence,
    )

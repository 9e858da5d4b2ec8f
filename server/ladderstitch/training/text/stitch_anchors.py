"""Stitch trained language models into a family: maps by least squares, trained on if asked."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor

from ladderstitch.errors import DataError
from ladderstitch.text.bundle import write_tokenizer
from ladderstitch.text.manifest import TextManifest, TextVariant, write_manifest
from ladderstitch.text.model.family import DecoderFamily
from ladderstitch.text.model.family_weights import STITCHES, map_shapes
from ladderstitch.text.model.residual import plan_layers
from ladderstitch.text.model.weight_reader import SINGLE
from ladderstitch.text.tokenizer_files import TOKENIZER, copy_special_token_files
from ladderstitch.training.text.elastic_recipe import StitchSchedule
from ladderstitch.training.text.evaluate import read_tokens, split_windows
from ladderstitch.training.text.family_routes import Route, anchor_pairs, stitched_routes
from ladderstitch.training.text.scratch import select_batch
from ladderstitch.training.text.source_anchors import SourceAnchors
from ladderstitch.training.text.stitching_maps import fit_maps
from ladderstitch.training.text.switch_training import FamilyRun, draw_spans, train_family
from ladderstitch.training.text.trainable_family import TrainableFamily

WINDOW, SEGMENT, BATCH_WINDOWS = 256, 32, 8
FIT_TOKENS = 32_768
"""Most tokens of the least squares, unless that is less than `MOST_ROWS`."""
MIN_ROWS, MOST_ROWS = 4, 16
"""Tokens per feature of the widest anchor: fewer are refused, more are not used."""


@dataclass(frozen=True, slots=True)
class StitchOptions:
    """What the user states: calibration text, paths, minutes of training, and seed."""

    text: Path
    name: str
    licence: str = "not stated"
    paths: int = 12
    minutes: float = 0.0
    seed: int = 0
    threads: int = 1


def stitch_anchors(
    anchors: SourceAnchors, options: StitchOptions, into: Path, progress: Progress
) -> dict[str, float]:
    """Fit maps between the anchors and write the family's bundle, which is not calibrated.

    The weights of the anchors are copied as they are. Returns the share of the variance that each
    map explained on the text before any training, by its name. Raises `DataError` for a text that
    cannot be read or is too short.
    """
    torch.set_num_threads(options.threads)
    stored = dict(anchors.tensors())
    windows = _windows(anchors, options)
    shapes = map_shapes(DecoderFamily(anchors.configs))
    tensors = {name: tensor.float() for name, tensor in stored.items()}
    tensors |= {name: torch.zeros(shape) for name, shape in shapes.items()}
    plans = plan_layers(anchors.residual, DecoderFamily(anchors.configs).deepest, 1)
    family = TrainableFamily(anchors.configs, tensors, plans)
    chosen = _select_rows(family, windows, options.seed)
    task = progress.add_task("least squares", total=len(chosen))
    explained = fit_maps(family, chosen[:, :-1], lambda n: progress.advance(task, n))
    if options.minutes > 0:
        _train(family, windows, options, into / "work", progress)
    maps = {name: tensors[name].detach().contiguous() for name in shapes}
    into.mkdir(parents=True, exist_ok=True)
    manifest, source = _manifest(anchors, options), anchors.largest.path
    write_manifest(into, manifest)
    save_file(stored | maps, into / SINGLE)
    write_tokenizer(into, source / TOKENIZER, manifest)
    copy_special_token_files(source, into)
    return {name.removeprefix(STITCHES): share for name, share in explained.items()}


def _windows(anchors: SourceAnchors, options: StitchOptions) -> Tensor:
    """Return all windows [W, T + 1] of the text."""
    widest = max(config.hidden_size for config in anchors.configs)
    window = min(WINDOW, anchors.configs[-1].max_positions)
    window = max(1, window // SEGMENT) * min(SEGMENT, window)
    tokens = read_tokens(options.text, anchors.largest.tokenizer())
    if len(tokens) <= MIN_ROWS * widest:
        raise DataError(
            f"{options.text}: expected more than {MIN_ROWS * widest} tokens, {MIN_ROWS} for each "
            f"feature of the widest model, got {len(tokens)}"
        )
    return split_windows(tokens, window)


def _select_rows(family: TrainableFamily, windows: Tensor, seed: int) -> Tensor:
    """Return the windows of the least squares: a random selection if there are more."""
    widest = max(model.config.hidden_size for model in family.models)
    count = max(FIT_TOKENS, MOST_ROWS * widest) // (windows.shape[1] - 1)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:count].sort().values]


def _train(
    family: TrainableFamily,
    windows: Tensor,
    options: StitchOptions,
    folder: Path,
    progress: Progress,
) -> None:
    """Train the maps in place for about the minutes; the anchors stay as they are."""
    window = windows.shape[1] - 1
    schedule = StitchSchedule(
        tokens=0,
        window=window,
        batch_windows=min(BATCH_WINDOWS, len(windows)),
        segment=min(SEGMENT, window),
        anchor_learning_rate_factor=0.0,
        train_largest=False,
        threads=options.threads,
    )
    step_s = _step_s(family, schedule, windows, options.seed)
    steps = max(1, round(60 * options.minutes / step_s))
    tokens = steps * window * schedule.batch_windows
    schedule = schedule.model_copy(update={"tokens": tokens, "measure_steps": steps})
    try:
        train_family(family, schedule, options.seed, windows, folder, lambda f: {}, progress)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _step_s(family: TrainableFamily, schedule: StitchSchedule, windows: Tensor, seed: int) -> float:
    """Return the mean seconds of a training step; weights are not changed."""
    run, count = FamilyRun.create(family, schedule), 4
    random = torch.Generator().manual_seed(seed)
    for number in range(count + 1):
        if number == 1:  # the first one is slower
            started = time.monotonic()
        batch = select_batch(windows, schedule.batch_windows, seed, number)
        spans = draw_spans(schedule, family.decoders, random)
        torch.autograd.backward(torch.stack([*run.losses(batch, spans).values()]).sum())
        run.optimizer.zero_grad()
    return (time.monotonic() - started) / count


def choose_routes(family: DecoderFamily, most: int) -> tuple[Route, ...]:
    """Return the anchors' paths and at most `most` stitched ones, at evenly spread layers.

    Paths to a larger anchor and those back get the same share.
    """
    anchors = len(family.anchors)
    pairs = anchor_pairs(anchors)
    stitched = [r for pair in pairs for r in _spread(stitched_routes(family, *pair), most, pairs)]
    return (*map(Route.of_anchor, range(anchors)), *stitched[:most])


def _spread(routes: Sequence[Route], most: int, pairs: Sequence[object]) -> list[Route]:
    count = min(len(routes), -(-most // len(pairs)))
    return [routes[(2 * n + 1) * len(routes) // (2 * count)] for n in range(count)]


def _manifest(anchors: SourceAnchors, options: StitchOptions) -> TextManifest:
    *smaller, largest = anchors.configs
    source, family = anchors.largest, DecoderFamily(anchors.configs)
    paths = tuple(
        TextVariant(
            name=route.name(anchors.names),
            residual=anchors.residual,
            route=route.segments(family),
        )
        for route in choose_routes(family, options.paths)
    )
    own = source.manifest.model_dump(
        include={"end_tokens", "sampling", "chat_template", "special_tokens"}
    )
    return TextManifest.model_validate(
        own
        | {
            "name": options.name,
            "config": largest.model_dump(exclude_unset=True),
            "anchors": [config.model_dump(exclude_unset=True) for config in smaller],
            "residual": anchors.residual.model_dump(exclude_unset=True),
            "paths": [path.model_dump(exclude_unset=True) for path in paths],
            "origin": f"{', '.join(anchors.names)}, stitched on {options.text.name}",
            "licence": options.licence,
        }
    )

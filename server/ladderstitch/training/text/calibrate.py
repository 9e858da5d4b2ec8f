"""Quality of every path of a language model, and its low-bit paths; measured as they are served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from ladderstitch.errors import ConfigError
from ladderstitch.runtime.device import versions
from ladderstitch.runtime.low_bit import LowBitPrecision
from ladderstitch.scheduling.profiles import QualityTable
from ladderstitch.text.bundle import SWITCHES, TextBundle
from ladderstitch.text.engine.rank_config import RankConfig
from ladderstitch.text.engine.rank_models import load_models
from ladderstitch.text.manifest import TextManifest, write_manifest
from ladderstitch.text.messages import LogitsMode
from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.shard import Shard
from ladderstitch.text.switches import SwitchTable
from ladderstitch.training.text.evaluate import (
    CONFIDENCE,
    METRIC,
    measure_quality,
    read_tokens,
    split_windows,
)
from ladderstitch.training.text.switches import (
    CONTEXT_TOKENS,
    NEXT_TOKENS,
    PathRunner,
    measure_switches,
)


@dataclass(frozen=True, slots=True)
class Sample:
    """The part of a text that is measured: up to `tokens` predicted tokens.

    It is drawn in windows of `window` tokens, or as many as the model has positions. Each window
    starts without context. Changes of path are measured on `switches` longer windows.
    """

    tokens: int = 16_384
    window: int = 256
    switches: int = 8


DEFAULT_SAMPLE = Sample()
MAX_CALIBRATED_TOKENS = 1024
"""Longest sequence for which `open_runner` has room."""


def calibrate(
    bundle: TextBundle, text: Path, sample: Sample, threads: int, progress: Progress
) -> QualityTable:
    """Measure every path on a held-out text, and write the bundle's `quality.json`.

    If the paths write different keys and values, changes between them are measured, too, and
    written to `switches.json`. Raises `DataError` if the text cannot be read or is too short.
    """
    window = min(sample.window, bundle.manifest.config.max_positions)
    tokens = read_tokens(text, bundle.tokenizer())
    windows = split_windows(tokens, window, sample.tokens // window)
    runner = open_runner(bundle, threads)
    qualities = {}
    for number, variant in enumerate(bundle.manifest.variants):
        task = progress.add_task(variant.name, total=len(windows))
        predict = partial(runner.run, number, start=0, mode=LogitsMode.ALL)
        qualities[number] = measure_quality(predict, windows, partial(progress.advance, task))
    table = QualityTable(
        metric=METRIC,
        data=text.name,
        n=windows[:, 1:].numel(),
        confidence=CONFIDENCE,
        date=datetime.now(UTC).date().isoformat(),
        versions=versions(),
        variants=qualities,
    )
    (bundle.path / "quality.json").write_text(table.model_dump_json(indent=1) + "\n")
    _write_switches(bundle, runner, tokens, sample, text.name, progress)
    return table


def add_switches(bundle: TextBundle, text: Path, threads: int, progress: Progress) -> None:
    """Measure the changes of path of a bundle on a held-out text, as `calibrate` does."""
    runner, tokens = open_runner(bundle, threads), read_tokens(text, bundle.tokenizer())
    _write_switches(bundle, runner, tokens, DEFAULT_SAMPLE, text.name, progress)


def _write_switches(
    bundle: TextBundle,
    runner: PathRunner,
    tokens: Tensor,
    sample: Sample,
    data: str,
    progress: Progress,
) -> None:
    """Measure changes between paths that write different keys and values, on tokens [T].

    They are written to the bundle's `switches.json`, if there are any. `data` names the text.
    """
    kinds = {
        number: min(runner.config.alternatives[number])
        for number, variant in enumerate(bundle.manifest.variants)
        if not variant.by_name  # budgets do not choose it
    }
    if len(set(kinds.values())) > 1:
        switches = _measure_switches(runner, kinds, tokens, sample, data, progress)
        (bundle.path / SWITCHES).write_text(switches.model_dump_json(indent=1) + "\n")


def open_runner(bundle: TextBundle, threads: int) -> PathRunner:
    """Return all paths of a bundle on one rank, with a cache for one sequence of full length."""
    longest = min(bundle.manifest.config.max_positions, MAX_CALIBRATED_TOKENS)
    config = RankConfig.of(bundle, threads=threads, max_model_len=longest, sequences=1)
    torch.set_num_threads(threads)
    shard, family = Shard.of(config.model, 0, 1), config.family
    cache = PagedCache(
        config.model,
        shard,
        config.blocks,
        config.block_tokens,
        config.cache_dtype,
        planes=family.num_planes,
        query_heads=[anchor.heads for anchor in family.anchors],
    )
    return PathRunner(config, load_models(config, shard), cache)


def _measure_switches(
    runner: PathRunner,
    kinds: Mapping[int, int],
    tokens: Tensor,
    sample: Sample,
    data: str,
    progress: Progress,
) -> SwitchTable:
    """Return the penalties of changes of path, in windows of the longest length that fits."""
    length = min(CONTEXT_TOKENS + NEXT_TOKENS, runner.config.max_model_len, len(tokens) - 1)
    context = length * CONTEXT_TOKENS // (CONTEXT_TOKENS + NEXT_TOKENS)
    windows = split_windows(tokens, length, sample.switches)[:, :length]
    task = progress.add_task("changes between paths", total=len(windows))
    advance = partial(progress.advance, task)
    return measure_switches(runner, kinds, windows, context, data, advance)


def add_precision(bundle: TextBundle, precision: LowBitPrecision) -> TextBundle:
    """Return the bundle with a form in this precision of every path that has none of its own.

    Paths with narrower MLPs get none: low-bit matrices have no slices. The new paths must be
    calibrated before `write_paths`. Raises `ConfigError` if they exist.
    """
    present = bundle.manifest.variants
    names = {variant.name for variant in present}
    added = tuple(
        variant.model_copy(update={"name": f"{variant.name}-{precision}", "precision": precision})
        for variant in present
        if variant.precision is None and not variant.ffn_widths
    )
    if twice := sorted(names & {variant.name for variant in added}):
        raise ConfigError(f"precision: expected one that the bundle lacks, it has {twice}")
    fields = bundle.manifest.model_dump() | {"paths": (*present, *added)}
    return replace(bundle, manifest=TextManifest.model_validate(fields))


def quantise(
    bundle: TextBundle,
    precision: LowBitPrecision,
    text: Path,
    sample: Sample,
    threads: int,
    progress: Progress,
) -> QualityTable:
    """Add a form of every path in this precision to a bundle, and measure all paths.

    Matrices are quantised when they are loaded, so that only the manifest and the qualities change.
    Raises `ConfigError` if the bundle has such paths, `DataError` as `calibrate` does.
    """
    extended = add_precision(bundle, precision)
    table = calibrate(extended, text, sample, threads, progress)
    write_manifest(bundle.path, extended.manifest)
    return table

"""Quality of every path of a language model, and its low-bit paths; measured as they are served."""

from __future__ import annotations

from collections.abc import Sequence
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
from ladderstitch.text.bundle import TextBundle, TextManifest, write_manifest
from ladderstitch.text.comm.base import SingleRankCommunicator
from ladderstitch.text.engine.rank_config import RankConfig
from ladderstitch.text.engine.rank_models import RankModel, load_models
from ladderstitch.text.messages import LogitsMode, SequenceInput, Step
from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.residual import LayerPlan, plan_layers
from ladderstitch.text.model.shard import Shard
from ladderstitch.training.text.evaluate import (
    CONFIDENCE,
    METRIC,
    measure_quality,
    read_tokens,
    split_windows,
)


@dataclass(frozen=True, slots=True)
class Sample:
    """The part of a text that is measured: up to `tokens` predicted tokens.

    It is drawn in windows of `window` tokens, or as many as the model has positions. Each window
    starts without context.
    """

    tokens: int = 16_384
    window: int = 256


DEFAULT_SAMPLE = Sample()


def calibrate(
    bundle: TextBundle, text: Path, sample: Sample, threads: int, progress: Progress
) -> QualityTable:
    """Measure every path on a held-out text, and write the bundle's `quality.json`.

    Raises `DataError` if the text cannot be read or is too short.
    """
    window = min(sample.window, bundle.manifest.config.max_positions)
    windows = split_windows(read_tokens(text, bundle.tokenizer()), window, sample.tokens // window)
    config = RankConfig.of(bundle, threads=threads, max_model_len=window, sequences=1)
    torch.set_num_threads(threads)
    shard, layers = Shard.of(config.model, 0, 1), config.model.layers
    cache = PagedCache(config.model, shard, config.blocks, config.block_tokens, config.cache_dtype)
    qualities = {}
    for number, model in enumerate(load_models(config, shard)):
        name = bundle.manifest.variants[number].name
        plans = plan_layers(config.paths[number], layers, 1)

        predict = partial(_predict, model, plans, cache, config)
        task = progress.add_task(name, total=len(windows))
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
    return table


def _predict(
    model: RankModel,
    plans: Sequence[LayerPlan],
    cache: PagedCache,
    config: RankConfig,
    tokens: Tensor,
) -> Tensor:
    """Return the logits [T, V] of one window of tokens [T]."""
    window = SequenceInput(tokens.tolist(), 0, range(config.blocks), LogitsMode.ALL)
    batch = Batch(Step((window,)), config.block_tokens)
    return model.forward(batch, cache, plans, SingleRankCommunicator())


def add_precision(bundle: TextBundle, precision: LowBitPrecision) -> TextBundle:
    """Return the bundle with a form in this precision of every path that has none of its own.

    The new paths must be calibrated before `write_paths`. Raises `ConfigError` if they exist.
    """
    present = bundle.manifest.variants
    names = {variant.name for variant in present}
    added = tuple(
        variant.model_copy(update={"name": f"{variant.name}-{precision}", "precision": precision})
        for variant in present
        if variant.precision is None
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

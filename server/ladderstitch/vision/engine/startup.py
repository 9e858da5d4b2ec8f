"""Start of an engine: open it for a bundle, and measure its networks on this machine."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import numpy as np
import torch

from ladderstitch.errors import BundleError, ConfigError
from ladderstitch.runtime import ProgressCallback
from ladderstitch.runtime.device import (
    device_name,
    resolve_device,
    resolve_dtype,
    resolve_runtime,
    versions,
)
from ladderstitch.scheduling.profiles import Latency, LatencyProfile, QualityTable
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.engine.base import Engine, EngineConfig
from ladderstitch.vision.engine.compiled import CompiledEngine
from ladderstitch.vision.engine.compiled_executor import CompiledExecutor
from ladderstitch.vision.engine.join_candidates import find_candidates, find_frontier
from ladderstitch.vision.engine.nested import NestedExecutor
from ladderstitch.vision.engine.process import ProcessEngine
from ladderstitch.vision.engine.profile_cache import (
    Pair,
    profile_path,
    read_profile,
    scale_profile,
    select_profile,
    write_profile,
)
from ladderstitch.vision.engine.units import export_bundle, routes_of
from ladderstitch.vision.models.nested.model import NestedConfig
from ladderstitch.vision.models.route import Precision, Stitch
from ladderstitch.vision.networks.config import OnnxConfig

log = logging.getLogger(__name__)

ASSUMED_TAIL = 1.3
"""Ratio of p99 to median that is assumed after a few runs; it is corrected online."""
TAIL_RUNS = 20
"""Number of runs from which the 99th percentile is measured."""
STEADY_S = 0.02
"""Runs of at least this duration vary little, so that one timed run is enough."""
START_ROUNDS = 5
"""Timed runs of each network on the frontier when a server measures its machine."""


def batch_sizes(max_batch_size: int) -> tuple[int, ...]:
    """Return the powers of two below the largest batch size, and that size itself."""
    sizes = [
        1 << power for power in range(max_batch_size.bit_length()) if 1 << power < max_batch_size
    ]
    return (*sizes, max_batch_size)


def make_config(
    bundle: VisionBundle,
    *,
    runtime: str,
    device: str,
    dtype: str,
    threads: int,
    max_batch_size: int,
) -> EngineConfig:
    """Return the configuration of a bundle's engine; `auto` is resolved on this machine.

    Raises `ConfigError` for a runtime, device or number format that cannot be used.
    """
    if isinstance(bundle.manifest.config, OnnxConfig):
        runtime, device, dtype = _resolve_for_networks(runtime, device, dtype)
    device = resolve_device(device)
    dtype = str(resolve_dtype(dtype, device)).removeprefix("torch.")
    return EngineConfig(
        bundle=str(bundle.path.resolve()),
        runtime=resolve_runtime(runtime, device, dtype),
        device=device,
        dtype=dtype,
        threads=threads,
        max_batch_size=max_batch_size,
        image_shape=bundle.manifest.config.inputs.shape,
        row_size=bundle.manifest.row_size,
    )


def _resolve_for_networks(runtime: str, device: str, dtype: str) -> tuple[str, str, str]:
    """Return runtime, device and number format of ONNX networks, whose `auto` is the only choice.

    Raises `ConfigError` for another one.
    """
    given = {"runtime": runtime, "device": device, "dtype": dtype}
    known = {"runtime": "onnx", "device": "cpu", "dtype": "float32"}
    for field, expected in known.items():
        if given[field] not in ("auto", expected):
            raise ConfigError(f"{field}: expected {expected} for ONNX networks, got {given[field]}")
    return known["runtime"], known["device"], known["dtype"]


async def open_engine(
    bundle: VisionBundle, config: EngineConfig, inline_limit_s: float, on_progress: ProgressCallback
) -> ProcessEngine | CompiledEngine:
    """Return the started engine that `config` describes.

    Its first start for these weights exports them. Raises `BundleError` if the weights do not fit,
    and `EngineDied` if a worker cannot load them.
    """
    if config.runtime == "torch":
        process = ProcessEngine(config)
        try:
            await process.start()
        except BaseException:
            await process.stop()
            raise
        return process
    executor = await asyncio.to_thread(open_executor, bundle, config.threads, on_progress)
    return CompiledEngine(executor, inline_limit_s)


def open_executor(
    bundle: VisionBundle, threads: int, on_progress: ProgressCallback
) -> CompiledExecutor:
    """Return the executor of a bundle; graphs in the cache that cannot be read are made again.

    Raises `BundleError` if the weights do not fit, or if the bundle's own graphs cannot be read.
    """
    folder = export_bundle(bundle, on_progress)
    try:
        return _open_folder(bundle, folder, threads)
    except Exception:  # the errors of ONNX Runtime have no common class
        log.exception("graphs in %s cannot be read, making them again", folder)
        shutil.rmtree(folder)
    folder = export_bundle(bundle, on_progress)
    try:
        return _open_folder(bundle, folder, threads)
    except Exception as error:
        raise BundleError(f"{bundle.path}: expected readable graphs: {error}") from error


def _open_folder(bundle: VisionBundle, folder: Path, threads: int) -> CompiledExecutor:
    """Return the executor of exported graphs."""
    if isinstance(bundle.manifest.config, NestedConfig):
        return NestedExecutor(bundle.load_nested(), folder, threads)
    return CompiledExecutor(routes_of(bundle, folder), threads)


def served_variants(bundle: VisionBundle, config: EngineConfig) -> tuple[Stitch, ...]:
    """Return the variants that this engine can run: torch has no 8-bit graphs."""
    among: tuple[Precision, ...] = ("float32",)
    return bundle.manifest.variants(None if config.runtime == "onnx" else among)


async def prepare(
    engine: Engine,
    bundle: VisionBundle,
    quality: QualityTable,
    config: EngineConfig,
    on_progress: ProgressCallback,
) -> LatencyProfile:
    """Make the engine fast on the frontier, and return the latency profile of this machine.

    The first start on a machine measures all networks, and keeps the profile in the cache. Later
    ones, and the first one if the bundle has a profile of this machine, run the frontier once and
    scale the profile by the median ratio of both measurements. `on_progress` is called with the
    number of finished runs and of all runs.
    """
    path = await asyncio.to_thread(profile_path, bundle, config)
    sizes = batch_sizes(config.max_batch_size)
    stitches = [variant.id for variant in served_variants(bundle, config) if variant.usable]
    known = select_profile(bundle.latency, config, sizes, stitches) or read_profile(path)
    if known is None:
        profile = await measure_profile(
            engine, stitches, quality, config, sizes, START_ROUNDS, on_progress
        )
        write_profile(path, profile)
        return profile
    best = find_frontier(quality, known)
    await engine.join(best)
    pairs = [(stitch, size) for size in sizes for stitch in best]
    return scale_profile(known, _medians(await _time_runs(engine, config, pairs, 1, on_progress)))


async def measure_profile(
    engine: Engine,
    stitches: Sequence[int],
    quality: QualityTable | None,
    config: EngineConfig,
    sizes: tuple[int, ...],
    rounds: int,
    on_progress: ProgressCallback,
) -> LatencyProfile:
    """Return seconds of compute by (stitch, batch size): the median and 99th percentile of runs.

    All stitches take turns, so that a disturbance of the machine affects all of them equally. Then
    the engine joins those that may be on the frontier, and they are measured again, `rounds` times.
    Without `quality`, all may be.
    """
    pairs = [(stitch, size) for size in sizes for stitch in stitches]
    seconds = await _time_runs(engine, config, pairs, 1, on_progress)
    alone = [(stitch, 1) for stitch in stitches]
    seconds |= await _time_runs(engine, config, alone, START_ROUNDS, on_progress)
    profile = _build_profile(config, sizes, seconds)
    best = stitches if quality is None else find_candidates(quality, profile)
    await engine.join(best)
    pairs = [(stitch, size) for size in sizes for stitch in best]
    seconds |= await _time_runs(engine, config, pairs, rounds, on_progress)
    return _build_profile(config, sizes, seconds)


async def _time_runs(
    engine: Engine,
    config: EngineConfig,
    pairs: Sequence[Pair],
    rounds: int,
    on_progress: ProgressCallback,
) -> dict[Pair, list[float]]:
    """Return seconds of compute of `rounds` runs of each pair, after one that is not counted.

    The uncounted run of a round, where memory is allocated, directly precedes a counted one: cache
    misses that depend on the previous pair cost a small stitch 0.1 ms.
    """
    images = np.zeros((config.max_batch_size, *config.image_shape), np.float32)
    seconds: dict[Pair, list[float]] = defaultdict(list)
    done = 0
    for _ in range(rounds):
        for stitch, size in pairs:
            runs = seconds[stitch, size]
            if not runs or runs[-1] < STEADY_S:
                await engine.forward([images[:size]], stitch)
                runs.append((await engine.forward([images[:size]], stitch)).compute_s)
            done += 1
            on_progress(done, rounds * len(pairs))
    return seconds


def _build_profile(
    config: EngineConfig, sizes: tuple[int, ...], seconds: dict[Pair, list[float]]
) -> LatencyProfile:
    medians, stitches = _medians(seconds), dict.fromkeys(stitch for stitch, _ in seconds)
    return LatencyProfile(
        device=device_name(torch.device(config.device)),
        threads=config.threads,
        date=datetime.now(UTC).date().isoformat(),
        versions=versions(),
        batch_sizes=sizes,
        variants={
            stitch: Latency(
                median_s=tuple(_round(medians[stitch, size]) for size in sizes),
                p99_s=tuple(_round(_tail(seconds[stitch, size])) for size in sizes),
            )
            for stitch in stitches
        },
    )


def _medians(seconds: dict[Pair, list[float]]) -> dict[Pair, float]:
    return {pair: median(runs) for pair, runs in seconds.items()}


def _tail(runs: list[float]) -> float:
    """Return the 99th percentile, or an assumed one after a few runs."""
    if len(runs) < TAIL_RUNS:
        return ASSUMED_TAIL * median(runs)
    return float(np.quantile(runs, 0.99))


def _round(seconds: float) -> float:
    """Return the seconds with four significant digits."""
    return float(f"{seconds:.4g}")

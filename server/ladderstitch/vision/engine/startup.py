"""Start of an engine: open it for a bundle, and measure its networks on this machine."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import numpy as np
import torch

from ladderstitch.errors import BundleError, ConfigError
from ladderstitch.runtime import ProgressCallback
from ladderstitch.runtime.cache import cache_home
from ladderstitch.runtime.device import (
    device_name,
    resolve_device,
    resolve_dtype,
    resolve_runtime,
    versions,
)
from ladderstitch.scheduling.profiles import Latency, LatencyProfile, QualityTable, frontier
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.engine.base import Engine, EngineConfig
from ladderstitch.vision.engine.compiled import CompiledEngine, CompiledExecutor
from ladderstitch.vision.engine.nested import NestedExecutor
from ladderstitch.vision.engine.process import ProcessEngine
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
SLACK = 0.15
"""Share of its time by which a stitch may be slower than the frontier and still be joined."""
START_ROUNDS = 5
"""Timed runs of each network on the frontier when a server measures its machine."""

Pair = tuple[int, int]
"""A stitch and a batch size."""


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
    path = await asyncio.to_thread(_profile_path, bundle, config)
    sizes = batch_sizes(config.max_batch_size)
    stitches = [variant.id for variant in served_variants(bundle, config) if variant.usable]
    known = _select(bundle.latency, config, sizes, stitches) or _read_profile(path)
    if known is None:
        profile = await measure_profile(
            engine, stitches, quality, config, sizes, START_ROUNDS, on_progress
        )
        _write_profile(path, profile)
        return profile
    best = find_frontier(quality, known)
    await engine.join(best)
    pairs = [(stitch, size) for size in sizes for stitch in best]
    return _scale_profile(known, _medians(await _time_runs(engine, config, pairs, 1, on_progress)))


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
    best = stitches if quality is None else _find_candidates(quality, profile)
    await engine.join(best)
    pairs = [(stitch, size) for size in sizes for stitch in best]
    seconds |= await _time_runs(engine, config, pairs, rounds, on_progress)
    return _build_profile(config, sizes, seconds)


def _find_candidates(quality: QualityTable, profile: LatencyProfile) -> list[int]:
    """Return the stitches on the frontier, then those less than `SLACK` from it, fastest first.

    What joining saves differs between stitches, and a few runs are not exact.
    """
    seconds = {stitch: profile.alone_s(stitch) for stitch in profile.variants}
    points = find_frontier(quality, profile)

    def is_near(stitch: int) -> bool:
        return not any(
            quality.value(other) >= quality.value(stitch)
            and seconds[other] < (1 - SLACK) * seconds[stitch]
            for other in points
        )

    near = sorted(filter(is_near, seconds.keys() - points), key=seconds.__getitem__)
    return [*points, *near]


def find_frontier(quality: QualityTable, profile: LatencyProfile) -> list[int]:
    """Return the stitches on the frontier of quality and batch-1 latency, fastest first."""
    qualities = {stitch: score.value for stitch, score in quality.variants.items()}
    latencies = {stitch: profile.alone_s(stitch) for stitch in profile.variants}
    return [point.variant for point in frontier(qualities, latencies)]


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


def _profile_path(bundle: VisionBundle, config: EngineConfig) -> Path:
    """Return the cached profile's path, which depends on everything that the times depend on."""
    device = device_name(torch.device(config.device))
    settings = replace(config, bundle=bundle.digest()).to_json()
    key = hashlib.sha256(f"{settings} {device} {sorted(versions().items())}".encode())
    return cache_home() / "profiles" / f"{bundle.manifest.name}-{key.hexdigest()[:16]}.json"


def _write_profile(path: Path, profile: LatencyProfile) -> None:
    """Write the profile into the cache; if that fails, the next start measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(profile.model_dump_json())
        partial.rename(path)
    except OSError as error:
        log.warning("profile %s cannot be written: %s", path, error)


def _read_profile(path: Path) -> LatencyProfile | None:
    """Return the profile in the cache; None if there is none, or none that can be read."""
    try:
        return LatencyProfile.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("profile %s cannot be read, measuring again: %s", path, error)
        return None


def _select(
    profile: LatencyProfile | None,
    config: EngineConfig,
    sizes: tuple[int, ...],
    stitches: Sequence[int],
) -> LatencyProfile | None:
    """Return a profile of these stitches only, at these batch sizes.

    None if it is not of this machine and software: the profile that is shipped with a bundle may
    list stitches that this engine does not run.
    """
    here = (device_name(torch.device(config.device)), config.threads, versions())
    if profile is None or (profile.device, profile.threads, profile.versions) != here:
        return None
    if not set(sizes) <= set(profile.batch_sizes):
        return None
    index = [profile.batch_sizes.index(size) for size in sizes]
    chosen = {
        stitch: Latency(
            median_s=tuple(latency.median_s[i] for i in index),
            p99_s=tuple(latency.p99_s[i] for i in index),
        )
        for stitch, latency in profile.variants.items()
        if stitch in stitches
    }
    return profile.model_copy(update={"batch_sizes": sizes, "variants": chosen}) if chosen else None


def _scale_profile(profile: LatencyProfile, medians: dict[Pair, float]) -> LatencyProfile:
    """Return the profile times the median ratio of measured to profiled times."""
    factor = median(
        seconds / profile.variants[stitch].median_s[profile.batch_sizes.index(size)]
        for (stitch, size), seconds in medians.items()
    )
    scaled = {
        stitch: Latency(median_s=_times(factor, old.median_s), p99_s=_times(factor, old.p99_s))
        for stitch, old in profile.variants.items()
    }
    return profile.model_copy(update={"variants": scaled})


def _times(factor: float, seconds: Iterable[float]) -> tuple[float, ...]:
    return tuple(factor * s for s in seconds)

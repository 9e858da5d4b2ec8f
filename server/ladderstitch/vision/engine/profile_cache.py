"""The latency profile of a bundle on this machine: kept in the cache, selected and scaled."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from ladderstitch.runtime.cache import cache_home
from ladderstitch.runtime.device import (
    device_name,
    versions,
)
from ladderstitch.scheduling.profiles import Latency, LatencyProfile
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.engine.base import EngineConfig

log = logging.getLogger(__name__)


Pair = tuple[int, int]
"""A stitch and a batch size."""


def profile_path(bundle: VisionBundle, config: EngineConfig) -> Path:
    """Return the cached profile's path, which depends on everything that the times depend on."""
    device = device_name(torch.device(config.device))
    settings = replace(config, bundle=bundle.digest()).to_json()
    key = hashlib.sha256(f"{settings} {device} {sorted(versions().items())}".encode())
    return cache_home() / "profiles" / f"{bundle.manifest.name}-{key.hexdigest()[:16]}.json"


def write_profile(path: Path, profile: LatencyProfile) -> None:
    """Write the profile into the cache; if that fails, the next start measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(profile.model_dump_json())
        partial.rename(path)
    except OSError as error:
        log.warning("profile %s cannot be written: %s", path, error)


def read_profile(path: Path) -> LatencyProfile | None:
    """Return the profile in the cache; None if there is none, or none that can be read."""
    try:
        return LatencyProfile.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("profile %s cannot be read, measuring again: %s", path, error)
        return None


def select_profile(
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


def scale_profile(profile: LatencyProfile, medians: dict[Pair, float]) -> LatencyProfile:
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

"""Tests of the start of an engine: which profile it uses, and what it measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ladderstitch.scheduling.profiles import Latency, LatencyProfile
from ladderstitch.scheduling.requests import Pixels
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.engine.base import EngineConfig, EngineResult
from ladderstitch.vision.engine.startup import batch_sizes, make_config, measure_profile, prepare

Progress = list[tuple[int, int]]


class FakeEngine:
    """An engine whose stitches take the less time the higher their ids are."""

    def __init__(self) -> None:
        self.joined: list[list[int]] = []

    async def forward(self, images: Sequence[Pixels], stitch: int) -> EngineResult:
        """Return zeros and made-up seconds."""
        count = len(images[0])
        return EngineResult(np.zeros((count, 4), np.float32), count * (0.2 - stitch / 100))

    async def join(self, stitches: Sequence[int]) -> None:
        """Record the stitches."""
        self.joined.append(list(stitches))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of profiles in a cache of this test."""
    monkeypatch.setenv("LADDERSTITCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "profiles"


def config_of(bundle: VisionBundle, threads: int = 1) -> EngineConfig:
    """Return the configuration of a server on this machine's CPU."""
    return make_config(
        bundle, runtime="auto", device="cpu", dtype="auto", threads=threads, max_batch_size=8
    )


def cached_files(cache: Path) -> list[Path]:
    """Return the profiles in the cache."""
    return sorted(cache.glob("*"))


async def run_prepare(
    bundle: VisionBundle, threads: int = 1
) -> tuple[LatencyProfile, FakeEngine, Progress]:
    """Return the profile, the engine and the reported progress of one start."""
    engine, reported = FakeEngine(), Progress()
    assert bundle.quality is not None
    profile = await prepare(
        engine,
        bundle,
        bundle.quality,
        config_of(bundle, threads),
        lambda done, total: reported.append((done, total)),
    )
    return profile, engine, reported


def with_profile(bundle: VisionBundle, **changes: object) -> VisionBundle:
    """Return the bundle with another profile."""
    assert bundle.latency is not None
    return replace(bundle, latency=bundle.latency.model_copy(update=changes))


async def test_profile_of_this_machine_is_scaled(tiny_bundle: VisionBundle, cache: Path) -> None:
    profile, engine, reported = await run_prepare(tiny_bundle)
    assert engine.joined == [list(range(17))]  # of the bundle's profile, not of the engine
    assert reported[-1] == (17 * 4, 17 * 4)
    assert cached_files(cache) == []
    shipped = tiny_bundle.latency
    assert shipped is not None
    assert profile.batch_sizes == (1, 2, 4, 8)
    ratios = {
        round(measured / profiled, 6)
        for stitch, latency in profile.variants.items()
        for measured, profiled in zip(
            latency.median_s, shipped.variants[stitch].median_s[:4], strict=True
        )
    }
    assert len(ratios) == 1


async def test_profile_with_stitches_that_the_engine_lacks_is_used_without_them(
    tiny_bundle: VisionBundle, cache: Path
) -> None:
    assert tiny_bundle.latency is not None
    assert tiny_bundle.quality is not None
    seconds = (1e-9,) * len(tiny_bundle.latency.batch_sizes)
    fast = Latency(median_s=seconds, p99_s=seconds)
    scores = tiny_bundle.quality.variants
    bundle = replace(
        with_profile(tiny_bundle, variants={**tiny_bundle.latency.variants, 99: fast}),
        quality=tiny_bundle.quality.model_copy(update={"variants": {**scores, 99: scores[0]}}),
    )
    profile, engine, _ = await run_prepare(bundle)
    assert cached_files(cache) == []  # it was not measured again
    assert 99 not in profile.variants
    assert 99 not in {stitch for joined in engine.joined for stitch in joined}


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "another"},
        {"threads": 2},
        {"versions": {}},
        {"batch_sizes": (1, 2, 4, 16, 32, 64)},
    ],
    ids=["device", "threads", "versions", "sizes"],
)
async def test_profile_of_another_machine_is_measured_once(
    tiny_bundle: VisionBundle, cache: Path, changes: dict[str, object]
) -> None:
    bundle = with_profile(tiny_bundle, **changes)
    first, engine, reported = await run_prepare(bundle)
    assert engine.joined == [[16]]  # the fastest one has the best quality, too
    assert first.variants.keys() == set(range(17))
    assert first.variants[1].median_s == pytest.approx([0.19, 0.38, 0.76, 1.52])
    assert len(cached_files(cache)) == 1
    second, engine, fewer = await run_prepare(bundle)
    assert engine.joined == [[16]]
    assert len(fewer) == 4 < len(reported)
    assert second.variants[16].median_s == pytest.approx(first.variants[16].median_s)


async def test_cached_profile_depends_on_threads(tiny_bundle: VisionBundle, cache: Path) -> None:
    bundle = with_profile(tiny_bundle, device="another")
    await run_prepare(bundle, threads=1)
    await run_prepare(bundle, threads=2)
    assert len(cached_files(cache)) == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[1]"])
async def test_unreadable_cached_profile_is_measured_again(
    tiny_bundle: VisionBundle, cache: Path, content: bytes
) -> None:
    bundle = with_profile(tiny_bundle, device="another")
    first, _, reported = await run_prepare(bundle)
    [file] = cached_files(cache)
    file.write_bytes(content)
    again, _, reported_again = await run_prepare(bundle)
    assert (again, len(reported_again)) == (first, len(reported))


async def test_measure_profile_without_quality_joins_all(tiny_bundle: VisionBundle) -> None:
    engine = FakeEngine()
    config = config_of(tiny_bundle)
    await measure_profile(engine, [0, 1, 5], None, config, (1, 2), 2, lambda *_: None)
    assert engine.joined == [[0, 1, 5]]


def test_batch_sizes_end_with_max_batch_size() -> None:
    assert batch_sizes(1) == (1,)
    assert batch_sizes(8) == (1, 2, 4, 8)
    assert batch_sizes(12) == (1, 2, 4, 8, 12)

"""A synthetic family, a fake clock and a scripted engine for tests of image scheduling."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest

from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.latency_model import LatencyModel, LatencyView
from ladderstitch.scheduling.profiles import Latency, LatencyProfile
from ladderstitch.scheduling.requests import Deadlines, Pixels, Request
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.vision.engine.base import EngineResult
from ladderstitch.vision.scheduler.policies.demand import QualityHulls

QUALITY = {0: 0.70, 1: 0.80, 2: 0.90, 3: 0.75, 4: 0.72}
ALONE_MS = {0: 1.0, 1: 3.0, 2: 8.0, 3: 2.0, 4: 2.5}
"""Milliseconds at batch size 1. Variant 3 dominates variant 4; the frontier is 0, 3, 1, 2."""
SIZES = (1, 2, 4, 8)


def make_profile() -> LatencyProfile:
    """Return a profile whose seconds are linear in the batch size, with a p99 of 1.2 medians."""
    return LatencyProfile(
        device="synthetic",
        threads=1,
        date="2026-01-01",
        versions={},
        batch_sizes=SIZES,
        variants={
            variant: Latency(
                median_s=tuple(ms * 1e-3 * (0.6 + 0.4 * b) for b in SIZES),
                p99_s=tuple(ms * 1.2e-3 * (0.6 + 0.4 * b) for b in SIZES),
            )
            for variant, ms in ALONE_MS.items()
        },
    )


def make_candidates(**settings: object) -> CandidateFilter:
    """Return the filter of the synthetic family under the given settings."""
    return CandidateFilter.from_settings(
        QUALITY, make_profile(), SchedulerSettings.model_validate(settings)
    )


@cache
def make_hulls() -> QualityHulls:
    """Return the quality hulls of the synthetic family."""
    return QualityHulls.from_profile(make_candidates().frontier, QUALITY, plain_view().profiled)


def plain_view(tail: float = 1.0, slowdown: float = 1.0) -> LatencyView:
    """Return a view of the profile without observations."""
    profiled = LatencyModel(make_profile()).view.profiled
    return LatencyView(profiled, max_batch_size=8, slowdown=slowdown, tail=tail)


def make_request(
    soft: float = float("inf"),
    *,
    arrival: float = 0.0,
    hard: float = float("inf"),
    num_images: int = 1,
    **fields: object,
) -> Request:
    """Return a request of blank images [num_images, 1, 2, 2]."""
    return Request(
        id="r",
        images=np.zeros((num_images, 1, 2, 2), np.float32),
        arrival=arrival,
        deadlines=Deadlines(soft, hard, "test", "test"),
        **fields,  # type: ignore[arg-type] # passed through
    )


class FakeClock:
    """A clock that the test advances by setting `now`."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class ScriptedEngine:
    """An engine that advances the clock by the profile's seconds instead of computing.

    Row r of the logits is the variant and the first pixel of image r, so that a test sees which
    request an answer belongs to. `script` is called first and may raise. If `gate` is set, calls
    wait until the test opens it. `result` may change what comes back.
    """

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.calls: list[tuple[int, int]] = []
        """Variant and batch size of each call."""
        self.script: Callable[[Sequence[Pixels], int], None] = lambda images, variant: None
        self.slowdown = 1.0
        self.gate: asyncio.Event | None = None
        self.result: Callable[[EngineResult], EngineResult] = lambda result: result
        self.view = plain_view()

    async def forward(self, images: Sequence[Pixels], stitch: int) -> EngineResult:
        """Return the logits of a batch after the profile's seconds on the clock."""
        batch_size = sum(len(request) for request in images)
        self.calls.append((stitch, batch_size))
        if self.gate is not None:
            await self.gate.wait()
        else:
            await asyncio.sleep(0)
        self.script(images, stitch)
        seconds = self.view.expected(stitch, batch_size) * self.slowdown
        self.clock.now += seconds
        first = np.concatenate([request[:, 0, 0, 0] for request in images])
        logits = np.stack([np.full(batch_size, stitch, np.float32), first], axis=1)
        return self.result(EngineResult(logits, seconds))


@pytest.fixture
def clock() -> FakeClock:
    """A clock at 100 s."""
    return FakeClock()

"""A made-up family and clock for the pure parts, and an engine that answers from a script."""

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
from ladderstitch.vision.scheduler.policies.quality_hull import QualityHulls

QUALITY = {0: 0.70, 1: 0.80, 2: 0.90, 3: 0.75, 4: 0.72}
ALONE_MS = {0: 1.0, 1: 3.0, 2: 8.0, 3: 2.0, 4: 2.5}
"""Stitch 4 is dominated by 3; the frontier is 0, 3, 1, 2."""
SIZES = (1, 2, 4, 8)


def make_profile() -> LatencyProfile:
    return LatencyProfile(
        device="made up",
        threads=1,
        date="2026-01-01",
        versions={},
        batch_sizes=SIZES,
        variants={
            s: Latency(
                median_s=tuple(ms * 1e-3 * (0.6 + 0.4 * b) for b in SIZES),
                p99_s=tuple(ms * 1.2e-3 * (0.6 + 0.4 * b) for b in SIZES),
            )
            for s, ms in ALONE_MS.items()
        },
    )


def make_candidates(**settings: object) -> CandidateFilter:
    return CandidateFilter.from_settings(
        QUALITY, make_profile(), SchedulerSettings.model_validate(settings)
    )


@cache
def make_hulls() -> QualityHulls:
    return QualityHulls.of(make_candidates().frontier, QUALITY, plain_view().profiled)


def plain_view(tail: float = 1.0, slowdown: float = 1.0) -> LatencyView:
    profiled = LatencyModel(make_profile()).view.profiled
    return LatencyView(profiled, max_batch_size=8, slowdown=slowdown, tail=tail)


def make_request(
    target: float = float("inf"),
    *,
    arrival: float = 0.0,
    limit: float = float("inf"),
    rows: int = 1,
    **wishes: object,
) -> Request:
    return Request(
        id="r",
        images=np.zeros((rows, 1, 2, 2), np.float32),
        arrival=arrival,
        deadlines=Deadlines(target, limit, "test", "test"),
        **wishes,  # type: ignore[arg-type] # passed through
    )


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class ScriptedEngine:
    """Advances the clock by the profile's seconds; `script` may raise for a call first.

    Row r of the logits says which variant ran and the first pixel of image r, so that a test sees
    whose answer it got. With `gate` set, calls wait until the test opens it. `result` may spoil
    what comes back.
    """

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.calls: list[tuple[int, int]] = []
        self.script: Callable[[Sequence[Pixels], int], None] = lambda images, variant: None
        self.slowdown = 1.0
        self.gate: asyncio.Event | None = None
        self.result: Callable[[EngineResult], EngineResult] = lambda result: result
        self.view = plain_view()

    async def forward(self, images: Sequence[Pixels], variant: int) -> EngineResult:
        rows = sum(len(request) for request in images)
        self.calls.append((variant, rows))
        if self.gate is not None:
            await self.gate.wait()
        else:
            await asyncio.sleep(0)
        self.script(images, variant)
        seconds = self.view.expected(variant, rows) * self.slowdown
        self.clock.now += seconds
        first = np.concatenate([request[:, 0, 0, 0] for request in images])
        logits = np.stack([np.full(rows, variant, np.float32), first], axis=1)
        return self.result(EngineResult(logits, seconds))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()

"""The grid of scenarios on which policies are compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ladderstitch_loadtest.load import traces
from ladderstitch_loadtest.load.traces import BudgetClass, Times, Trace
from ladderstitch_loadtest.simulation.profiles import Family

SHARED_OVER_SLOWEST = 36 / 30.63
"""A shared budget over the slowest variant's largest batch: SuperServe's ratio."""
TIGHT_OVER_SHARED, RELAXED_OVER_SHARED = 8 / 36, 100 / 36
TIGHT_SHARE = 0.3
CV2_VALUES = (0.0, 1.0, 2.0, 4.0, 8.0)
LOADS = (0.3, 0.75, 1.2)
IMAGES_PER_TRACE = 4_500
"""Length of a trace: the number of images that full capacity computes in its time."""

Shape = Literal["gamma", "ramp", "step", "replay"]


@dataclass(frozen=True, slots=True)
class Scenario:
    """An arrival process with its load and its budgets.

    `load` is the mean rate over the rate that the fastest variant can serve. A ramp goes from a
    quarter of the load to 7/4 of it and back. A step is at half of the load, and at 2.5 times of it
    for a quarter of the time. `requests` overrides the length of the trace; `file` is the file of
    arrivals for the shape `replay`.
    """

    shape: Shape
    load: float
    cv2: float = 1.0
    mixed: bool = False
    replicas: int = 1
    spread: float = 1.0
    requests: int | None = None
    file: Path | None = None

    @property
    def short(self) -> bool:
        """Whether the oracle can be computed."""
        return self.requests is not None

    @property
    def name(self) -> str:
        """The name in tables and results."""
        kind = {"gamma": f"CV² {self.cv2:g}", "replay": self.file.stem if self.file else ""}
        budgets = "mixed" if self.mixed else "shared"
        length = f", {self.requests} requests" if self.requests else ""
        return f"{kind.get(self.shape, self.shape)}, load {self.load:g}, {budgets}{length}"

    def trace(self, family: Family, seed: int) -> Trace:
        """Return the trace of a seed; its mean rate is the load on all replicas."""
        rng = np.random.default_rng(seed)
        capacity = family.capacity_rps * self.replicas
        rate = self.load * capacity
        seconds = IMAGES_PER_TRACE / capacity if not self.requests else self.requests / rate
        times = self._draw_times(rate, seconds, seed, rng)
        if self.requests:
            times = times[: self.requests]
        return Trace.draw(self.name, times, budget_classes(family, mixed=self.mixed), rng)

    def _draw_times(
        self, rate: float, seconds: float, seed: int, rng: np.random.Generator
    ) -> Times:
        match self.shape:
            case "gamma":
                return traces.gamma(rate, self.cv2, seconds, rng)
            case "ramp":
                return traces.ramp(rate / 4, 7 * rate / 4, seconds, rng)
            case "step":
                return traces.step(rate / 2, 2.5 * rate, seconds / 4, seconds / 2, seconds, rng)
            case "replay":
                assert self.file is not None
                times = traces.read_arrivals(self.file)
                return traces.replay(times, rate, seconds, start=seed % 10 / 10)


def budget_classes(family: Family, *, mixed: bool) -> list[BudgetClass]:
    """Return budgets in proportion to the slowest variant's largest batch."""
    slowest = max(latency.median_s[-1] for latency in family.profile.variants.values())
    shared = SHARED_OVER_SLOWEST * slowest
    if not mixed:
        return [BudgetClass("shared", shared)]
    return [
        BudgetClass("tight", TIGHT_OVER_SHARED * shared, TIGHT_SHARE),
        BudgetClass("relaxed", RELAXED_OVER_SHARED * shared, 1 - TIGHT_SHARE),
    ]


def grid(replicas: int, arrival_files: tuple[Path, ...] = ()) -> Iterator[Scenario]:
    """Yield all scenarios for a family on `replicas` replicas."""
    for load in LOADS:
        for cv2 in CV2_VALUES:
            yield Scenario("gamma", load, cv2, replicas=replicas)
        for cv2 in (1.0, 8.0):
            yield Scenario("gamma", load, cv2, mixed=True, replicas=replicas)
    for mixed in (False, True):
        yield Scenario("ramp", 0.6, mixed=mixed, replicas=replicas)
        yield Scenario("step", 0.5, mixed=mixed, replicas=replicas)
        for file in arrival_files:
            yield Scenario("replay", 0.5, mixed=mixed, replicas=replicas, file=file)


def short_grid() -> Iterator[Scenario]:
    """Yield scenarios of one engine that are short enough for the oracle."""
    for load in (0.4, 0.8, 1.2):
        for cv2 in (1.0, 8.0):
            for mixed in (False, True):
                yield Scenario("gamma", load, cv2, mixed=mixed, spread=0.0, requests=80)

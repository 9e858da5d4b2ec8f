"""A server's record, once more: its decisions by the same planner, its arrivals by any policy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ladderstitch.errors import DataError, RequestError
from ladderstitch.scheduling.profiles import LatencyProfile
from ladderstitch.scheduling.requests import Request
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.vision.scheduler.planner import Planner
from ladderstitch.vision.scheduler.policies.base import Decision
from ladderstitch.vision.scheduler.policies.demand import FAR_S
from ladderstitch.vision.scheduler.recorder import FORMAT, request_of
from ladderstitch_loadtest.load.traces import BudgetClass, Trace
from ladderstitch_loadtest.simulation.agreement import fitted
from ladderstitch_loadtest.simulation.policy_sweep import settings_of
from ladderstitch_loadtest.simulation.profiles import Family
from ladderstitch_loadtest.simulation.simulator import simulate

ROUNDED_S = 1e-4
"""Budgets are told apart by so much when arrivals are simulated."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of offered images: what was in time, and the quality of that."""

    attainment: float
    effective_quality: float


@dataclass(slots=True)
class Replay:
    """A record, read and planned once more; `differences` are the first few, in words."""

    family: Family
    settings: SchedulerSettings
    offered: list[Request] = field(default_factory=list)
    admissions: int = 0
    decisions: int = 0
    same: int = 0
    differences: list[str] = field(default_factory=list)
    met_rows: int = 0
    value: float = 0.0
    ratios: list[float] = field(default_factory=list)
    transits_s: list[float] = field(default_factory=list)

    @property
    def recorded(self) -> Figures:
        """How the server did."""
        rows = sum(request.num_images for request in self.offered)
        return Figures(self.met_rows / rows, self.value / rows)

    @property
    def exact(self) -> bool:
        """Whether the planner did all that it did in the server."""
        return self.same == self.admissions + self.decisions

    def simulated(self, policy: str) -> Figures:
        """The recorded arrivals, an image each, on a machine as fast as the recorded one."""
        family, machine = fitted(self.family, self.ratios, median(self.transits_s))
        other = settings_of(policy)
        settings = self.settings.model_copy(
            update={
                "policy": other.policy,
                "fixed_variant": other.fixed_variant,
                "pinned_variant": None,
            }
        )
        hard = any(request.deadlines.hard < float("inf") for request in self.offered)
        summary = simulate(family, _trace(self.offered), settings, machine, hard=hard).summary()
        return Figures(summary.attainment, summary.effective_quality)


def replay(path: Path) -> Replay:
    """Tell a fresh planner all that the server's was told, and compare what it does.

    Raises `DataError` for a file that is no record, or one without a single batch.
    """
    try:
        lines = path.read_text().splitlines()
        made_of = json.loads(lines[0])
        if made_of["format"] != FORMAT:
            raise DataError(f"{path}: expected format {FORMAT}, got {made_of['format']}")
        found = _Replayer(made_of, json.loads(lines[1])).run(_events(lines[2:]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: expected a record of a server: {error}") from error
    if not found.ratios:
        raise DataError(f"{path}: expected at least one batch that was answered")
    return found


def _events(lines: list[str]) -> Iterator[list[Any]]:
    """All but a last line that was cut off with the server."""
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError:
            if number < len(lines):
                raise


class _Replayer:
    def __init__(self, made_of: dict[str, Any], configured: list[Any]) -> None:
        quality = {int(variant): value for variant, value in made_of["quality"].items()}
        profile = LatencyProfile.model_validate(made_of["profile"])
        settings = SchedulerSettings.model_validate(configured[1])
        self.planner = Planner(quality, profile, settings)
        self.found = Replay(Family("recorded", quality, profile), settings)
        self.numbers: dict[int, Request] = {}
        self.batch: list[Request] = []
        self.started_at = 0.0

    def run(self, events: Iterator[list[Any]]) -> Replay:
        for verb, *told in events:
            getattr(self, f"_{verb}")(*told)
        return self.found

    def _configure(self, settings: dict[str, Any]) -> None:
        self.planner.configure(SchedulerSettings.model_validate(settings))

    def _admit(self, now: float, alone: bool, refused: bool, *told: Any) -> None:
        request = _request(told)
        self.found.offered.append(request)
        self.found.admissions += 1
        try:
            self.planner.admit(request, now, alone=alone)
        except RequestError as error:
            self._compare(now, "refused" if refused else "admitted", "refused", str(error))
        else:
            self._compare(now, "refused" if refused else "admitted", "admitted")

    def _add(self, number: int, *told: Any) -> None:
        request = self.numbers[number] = _request(told)
        self.planner.add(request)

    def _put_back(self, number: int, *told: Any) -> None:
        request = self.numbers[number] = _request(told)
        self.planner.requeue(request)

    def _withdraw(self, number: int) -> None:
        self.planner.remove(self.numbers.pop(number))

    def _expire(self, now: float, numbers: list[int]) -> None:
        expected = [self.numbers.pop(number) for number in numbers]
        self.found.decisions += 1
        self._compare(
            now, f"{len(expected)} expired", f"{len(self.planner.take_expired(now))} expired"
        )

    def _hold(self, now: float, seconds: float) -> None:
        self.found.decisions += 1
        choice = self.planner.decide(now)
        self._compare(now, f"hold {seconds}", str(choice))

    def _decide(self, now: float, variant: int, numbers: list[int]) -> None:
        self.found.decisions += 1
        self.batch = [self.numbers.pop(number) for number in numbers]
        choice = self.planner.decide(now)
        got = "a hold"
        if isinstance(choice, Decision):
            same = list(choice.requests) == self.batch
            got = f"{len(choice.requests)}{'' if same else ' other'} requests on {choice.variant}"
        self._compare(now, f"{len(numbers)} requests on {variant}", got)

    def _started(self, rows: int, variant: int, now: float) -> None:
        self.started_at = now
        self.planner.started(rows, variant, now)

    def _finished(self, variant: int, rows: int, compute_s: float, total_s: float) -> None:
        found, view = self.found, self.planner.latency.view
        found.ratios.append(compute_s / view.profiled[variant][rows])
        found.transits_s.append(total_s - compute_s)
        for request in self.batch:
            if self.started_at + total_s <= request.deadlines.soft:
                found.met_rows += request.num_images
                found.value += request.num_images * found.family.quality[variant]
        self.batch = []
        self.planner.finished(variant, rows, compute_s, total_s)

    def _free(self) -> None:
        self.planner.free()

    def _compare(self, now: float, recorded: str, replayed: str, why: str = "") -> None:
        if recorded == replayed:
            self.found.same += 1
        elif len(self.found.differences) < 5:
            self.found.differences.append(
                f"at {now:.6f} s: recorded {recorded}, replayed {replayed} {why}".rstrip()
            )


def _request(told: Any) -> Request:
    rows = told[3]
    return request_of(list(told), np.zeros((rows, 0, 0, 0), np.float32))


def _trace(requests: list[Request]) -> Trace:
    """One arrival an image."""
    rows = [request.num_images for request in requests]
    arrivals = np.repeat([request.arrival for request in requests], rows)
    left = [min(request.deadlines.soft - request.arrival, FAR_S) for request in requests]
    budgets, picks = np.unique(np.round(np.array(left) / ROUNDED_S), return_inverse=True)
    classes = [BudgetClass(f"{ROUNDED_S * b:.4f} s", ROUNDED_S * b) for b in budgets.tolist()]
    order = np.argsort(arrivals, kind="stable")
    times, picks = arrivals[order] - arrivals.min(), np.repeat(picks, rows)[order]
    return Trace("recorded", times, picks, tuple(classes))

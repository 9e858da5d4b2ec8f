"""The replay of a server's record: the same decisions again, and the arrivals under any policy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ladderstitch.errors import DataError, RequestError
from ladderstitch.scheduling.cascades import Cascade, CascadeSet
from ladderstitch.scheduling.profiles import LatencyProfile
from ladderstitch.scheduling.requests import Request
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.vision.scheduler.planner import Planner
from ladderstitch.vision.scheduler.policies.base import Decision
from ladderstitch.vision.scheduler.policies.forecast import BUDGET_CAP_S
from ladderstitch.vision.scheduler.recorder import RECORD_FORMAT, request_from_fields
from ladderstitch_loadtest.load.traces import BudgetClass, Trace
from ladderstitch_loadtest.simulation.agreement import fit_machine
from ladderstitch_loadtest.simulation.policy_sweep import policy_settings
from ladderstitch_loadtest.simulation.profiles import Family
from ladderstitch_loadtest.simulation.simulator import simulate

BUDGET_RESOLUTION_S = 1e-4
"""Budgets are rounded to multiples of this when arrivals are simulated."""
MAX_DIFFERENCES = 5


@dataclass(frozen=True, slots=True)
class ReplayFigures:
    """The attainment and the effective quality of all offered images."""

    attainment: float
    effective_quality: float


@dataclass(slots=True)
class Replay:
    """The result of a replay."""

    family: Family
    settings: SchedulerSettings
    offered: list[Request] = field(default_factory=list)
    """Requests in order of arrival, the rejected ones included."""
    admissions: int = 0
    decisions: int = 0
    same: int = 0
    """Admissions and decisions that the planner repeated."""
    differences: list[str] = field(default_factory=list)
    """The first `MAX_DIFFERENCES` differences, as text."""
    met_images: int = 0
    value: float = 0.0
    """Sum of the quality of the images that were on time."""
    ratios: list[float] = field(default_factory=list)
    """Compute seconds of each batch over the profile's."""
    overheads_s: list[float] = field(default_factory=list)
    """Seconds of each batch in addition to compute."""

    @property
    def recorded(self) -> ReplayFigures:
        """The figures of the server."""
        offered = sum(request.num_images for request in self.offered)
        return ReplayFigures(self.met_images / offered, self.value / offered)

    @property
    def exact(self) -> bool:
        """Whether the planner repeated everything that it did in the server."""
        return self.same == self.admissions + self.decisions

    def simulate(self, policy: str) -> ReplayFigures:
        """Return the figures of a policy on the recorded arrivals, one image for each arrival.

        The simulated machine is as fast as the recorded one.
        """
        family, machine = fit_machine(self.family, self.ratios, median(self.overheads_s))
        other = policy_settings(policy)
        settings = self.settings.model_copy(
            update={
                "policy": other.policy,
                "fixed_variant": other.fixed_variant,
                "pinned_variant": None,
            }
        )
        hard = any(request.deadlines.hard < float("inf") for request in self.offered)
        trace = _make_trace(self.offered)
        summary = simulate(family, trace, settings, machine, hard=hard).summary()
        return ReplayFigures(summary.attainment, summary.effective_quality)


def replay(path: Path) -> Replay:
    """Give a new planner the recorded inputs of the server's, and compare its decisions.

    Raises `DataError` if the file is not a record or has no batch.
    """
    try:
        lines = path.read_text().splitlines()
        model = json.loads(lines[0])
        if model["format"] != RECORD_FORMAT:
            raise DataError(f"{path}: expected format {RECORD_FORMAT}, got {model['format']}")
        found = _Replayer(model, json.loads(lines[1])).run(_read_events(lines[2:]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: expected a record of a server: {error}") from error
    if not found.ratios:
        raise DataError(f"{path}: expected at least one batch that was answered, got none")
    return found


def _read_events(lines: list[str]) -> Iterator[list[Any]]:
    """Yield all events; a last line that was cut off when the server died is left out."""
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError:
            if number < len(lines):
                raise


class _Replayer:
    """A planner and the handlers of the events in a record."""

    def __init__(self, model: dict[str, Any], configured: list[Any]) -> None:
        quality = {int(variant): value for variant, value in model["quality"].items()}
        profile = LatencyProfile.model_validate(model["profile"])
        settings = SchedulerSettings.model_validate(configured[1])
        temperatures = {int(v): t for v, t in model.get("temperatures", {}).items()}
        known = tuple(Cascade.model_validate(fields) for fields in model.get("cascades", ()))
        cascades = CascadeSet(temperatures, known)
        self.planner = Planner(quality, profile, settings, cascades=cascades)
        self.found = Replay(Family("recorded", quality, profile, cascades), settings)
        self.cascade: Cascade | None = None
        self.requests: dict[int, Request] = {}
        self.batch: list[Request] = []
        self.started_at = 0.0
        self.handlers: dict[str, Callable[..., None]] = {
            "configure": self._configure,
            "admit": self._admit,
            "add": self._add,
            "put_back": self._requeue,
            "withdraw": self._remove,
            "expire": self._expire,
            "hold": self._defer,
            "decide": self._decide,
            "started": self._start_batch,
            "finished": self._finish_batch,
            "free": self.planner.on_engine_idle,
        }

    def run(self, events: Iterator[list[Any]]) -> Replay:
        """Return the result after all events."""
        for verb, *values in events:
            self.handlers[verb](*values)
        return self.found

    def _configure(self, settings: dict[str, Any]) -> None:
        self.planner.configure(SchedulerSettings.model_validate(settings))

    def _admit(self, now: float, alone: bool, rejected: bool, *fields: Any) -> None:
        request = _make_request(fields)
        self.found.offered.append(request)
        self.found.admissions += 1
        recorded = "rejected" if rejected else "admitted"
        try:
            self.planner.admit(request, now, alone=alone)
        except RequestError as error:
            self._compare(now, recorded, "rejected", str(error))
        else:
            self._compare(now, recorded, "admitted")

    def _add(self, number: int, *fields: Any) -> None:
        request = self.requests[number] = _make_request(fields)
        self.planner.add(request)

    def _requeue(self, number: int, *fields: Any) -> None:
        request = self.requests[number] = _make_request(fields)
        self.planner.requeue(request)

    def _remove(self, number: int) -> None:
        self.planner.remove(self.requests.pop(number))

    def _expire(self, now: float, numbers: list[int]) -> None:
        expected = [self.requests.pop(number) for number in numbers]
        self.found.decisions += 1
        expired = self.planner.remove_expired(now)
        self._compare(now, f"{len(expected)} expired", f"{len(expired)} expired")

    def _defer(self, now: float, seconds: float) -> None:
        self.found.decisions += 1
        choice = self.planner.decide(now)
        got = "a batch" if isinstance(choice, Decision) else f"defer {choice.seconds}"
        self._compare(now, f"defer {seconds}", got)

    def _decide(
        self, now: float, variant: int, numbers: list[int], first: int | None = None
    ) -> None:
        self.found.decisions += 1
        self.batch = [self.requests.pop(number) for number in numbers]
        choice = self.planner.decide(now)
        got = "defer"
        if isinstance(choice, Decision):
            same = list(choice.requests) == self.batch
            route = _route(None if choice.cascade is None else choice.first, choice.variant)
            got = f"{len(choice.requests)}{'' if same else ' other'} requests on {route}"
        self._compare(now, f"{len(numbers)} requests on {_route(first, variant)}", got)
        found = (c for c in self.planner.cascades.cascades if c.variants == (first, variant))
        self.cascade = next(found, None)

    def _start_batch(
        self, batch_size: int, variant: int, now: float, expected_s: float | None = None
    ) -> None:
        self.started_at = now
        self.planner.on_batch_started(batch_size, variant, now, expected_s)

    def _finish_batch(
        self, variant: int, batch_size: int, compute_s: float, total_s: float
    ) -> None:
        found, view = self.found, self.planner.latency.view
        found.ratios.append(compute_s / view.profiled[variant][batch_size])
        found.overheads_s.append(total_s - compute_s)
        for request in self.batch:
            if self.started_at + total_s <= request.deadlines.soft:
                found.met_images += request.num_images
                found.value += request.num_images * self._quality(request, variant)
        self.batch, self.cascade = [], None
        self.planner.on_batch_finished(variant, batch_size, compute_s, total_s)

    def _quality(self, request: Request, variant: int) -> float:
        """Return the calibrated quality of the variant, or of the cascade, that answered."""
        if self.cascade is None:
            return self.found.family.quality[variant]
        return self.cascade.quality(request.min_confidence)

    def _compare(self, now: float, recorded: str, replayed: str, why: str = "") -> None:
        if recorded == replayed:
            self.found.same += 1
        elif len(self.found.differences) < MAX_DIFFERENCES:
            self.found.differences.append(
                f"at {now:.6f} s: recorded {recorded}, replayed {replayed} {why}".rstrip()
            )


def _route(first: int | None, variant: int) -> str:
    return f"{variant}" if first is None else f"{first} and {variant}"


def _make_request(fields: Sequence[Any]) -> Request:
    num_images = fields[3]
    return request_from_fields(fields, np.zeros((num_images, 0, 0, 0), np.float32))


def _make_trace(requests: list[Request]) -> Trace:
    """Return a trace with one arrival for each image."""
    images = [request.num_images for request in requests]
    arrivals = np.repeat([request.arrival for request in requests], images)
    budgets_s = [
        min(request.deadlines.soft - request.arrival, BUDGET_CAP_S) for request in requests
    ]
    units, picks = np.unique(
        np.round(np.array(budgets_s) / BUDGET_RESOLUTION_S), return_inverse=True
    )
    classes = [
        BudgetClass(f"{BUDGET_RESOLUTION_S * unit:.4f} s", BUDGET_RESOLUTION_S * unit)
        for unit in units.tolist()
    ]
    order = np.argsort(arrivals, kind="stable")
    times, picks = arrivals[order] - arrivals.min(), np.repeat(picks, images)[order]
    return Trace("recorded", times, picks, tuple(classes))

"""At the door: refuse at once what cannot be answered in time, and say what could be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ladderstitch.errors import (
    BadInput,
    BudgetInfeasible,
    Overloaded,
    QualityUnavailable,
    StitchNotFound,
)
from ladderstitch.scheduling.candidates import Menu
from ladderstitch.scheduling.latency_model import LatencyView
from ladderstitch.scheduling.requests import Request
from ladderstitch.scheduling.settings import SchedulerSettings


@dataclass(frozen=True, slots=True)
class Load:
    """The scheduler's state at one instant; `busy_s` is what the running batch still takes."""

    now: float
    busy_s: float
    queued_requests: int
    queued_rows: int


@dataclass(frozen=True, slots=True)
class BudgetCheck:
    """Answer to "what could I have?"; stitches are None where nothing fits.

    `now_*` counts the work that waits, `idle_*` does not; `smallest_*` are the smallest budgets
    that the fastest stitch of the quality asked for needs.
    """

    now_stitch: int | None
    idle_stitch: int | None
    wait_s: float
    smallest_now_s: float
    smallest_idle_s: float


def admit(
    request: Request,
    menu: Menu,
    latency: LatencyView,
    load: Load,
    rows_ahead: float,
    settings: SchedulerSettings,
) -> None:
    """Raise the `RequestError` that says why a request is refused, if it is."""
    if not 1 <= request.rows <= latency.max_rows:
        raise BadInput(
            "images", f"expected 1 to {latency.max_rows} images a request, got {request.rows}"
        )
    _check_quality(request, menu)
    fastest = menu.candidates(request)[0]
    # Refused is only what would more likely miss its limit than not; advice errs on the safe side.
    alone_s = latency.expected(fastest, request.rows) + settings.overhead_s
    left_s = request.budget.limit - request.arrival
    if left_s < alone_s:
        enough_s = latency.seconds(fastest, request.rows) + settings.overhead_s
        raise BudgetInfeasible(
            f"budget: the limit of {_us(left_s)} us ({request.budget.limit_source}) is below the "
            f"{_us(enough_s)} us that the fastest admissible stitch takes alone",
            min_feasible_us=_us(enough_s),
        )
    wait_s = load.busy_s + work_s(rows_ahead, menu, latency)
    if request.budget.limit < load.now + wait_s + alone_s:
        raise Overloaded(
            f"budget: {_us(wait_s)} us of work come first, the limit leaves {_us(left_s)} us",
            retry_after_s=wait_s,
        )
    queued_s = work_s(load.queued_rows, menu, latency)
    if load.queued_requests >= settings.queue_limit_requests or queued_s > settings.queue_limit_s:
        raise Overloaded(
            f"the queue is full: {load.queued_requests} requests, about {queued_s:.2f} s of work",
            retry_after_s=queued_s,
        )


def check_budget(
    budget_s: float | None,
    min_quality: float,
    menu: Menu,
    latency: LatencyView,
    load: Load,
    settings: SchedulerSettings,
) -> BudgetCheck:
    """What a single image could have; raises `QualityUnavailable` if nothing is good enough."""
    _check_floor(min_quality, menu, menu.best)
    candidates = menu.choices(min_quality)
    wait_s = load.busy_s + work_s(load.queued_rows, menu, latency)
    needs = {s: latency.seconds(s, 1) + settings.overhead_s for s in candidates}
    budget = float("inf") if budget_s is None else budget_s
    idle = [stitch for stitch in candidates if needs[stitch] <= budget]
    now = [stitch for stitch in candidates if needs[stitch] + wait_s <= budget]
    smallest = min(needs.values())
    return BudgetCheck(
        now_stitch=now[-1] if now else None,
        idle_stitch=idle[-1] if idle else None,
        wait_s=wait_s,
        smallest_now_s=smallest + wait_s,
        smallest_idle_s=smallest,
    )


def work_s(rows: float, menu: Menu, latency: LatencyView) -> float:
    """Seconds that this many rows take at least: full batches on the fastest stitch allowed."""
    fastest = menu.choices()[0]
    if rows <= latency.max_rows:
        return latency.expected(fastest, round(rows)) if rows >= 1 else 0.0
    return rows * latency.expected(fastest, latency.max_rows) / latency.max_rows


def check_settings(settings: SchedulerSettings, quality: Mapping[int, float]) -> None:
    """Raise `BadInput` if settings name a stitch or a floor that the model does not have."""
    for field in ("stitch", "pinned_stitch"):
        stitch = getattr(settings, field)
        if stitch is not None and stitch not in quality:
            raise BadInput(field, f"expected one of the model's stitches, got {stitch}")
    best = max(quality.values())
    if settings.min_quality > best:
        raise BadInput(
            "min_quality",
            f"expected at most {best:.4f}, the best stitch's, got {settings.min_quality}",
        )


def _check_quality(request: Request, menu: Menu) -> None:
    if request.stitch is not None and request.stitch not in menu.quality:
        raise StitchNotFound(
            f"stitch_id: expected 0 to {max(menu.quality)}, got {request.stitch}",
            stitch_id=str(request.stitch),
        )
    _check_floor(request.min_quality, menu, menu.best if request.stitch is None else request.stitch)


def _check_floor(min_quality: float, menu: Menu, available: int) -> None:
    """`available` is the best that the request may have."""
    floor, most = max(min_quality, menu.floor), menu.quality[available]
    if most < floor:
        raise QualityUnavailable(
            f"min_quality: {floor:.4f} asked for, {most:.4f} is the most there is",
            max_quality=f"{most:.6f}",
        )


def _us(seconds: float) -> str:
    return str(round(1e6 * seconds))

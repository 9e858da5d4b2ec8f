"""Admission control: reject a request that cannot be answered in time, and say what is feasible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ladderstitch.errors import (
    BudgetInfeasible,
    InvalidArgument,
    Overloaded,
    QualityUnavailable,
    VariantNotFound,
)
from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.latency_model import LatencyView
from ladderstitch.scheduling.requests import Request
from ladderstitch.scheduling.settings import SchedulerSettings


@dataclass(frozen=True, slots=True)
class QueueLoad:
    """The load of a scheduler at one instant."""

    now: float
    busy_s: float
    """Expected seconds until the running batch ends; 0 if the engine is idle."""
    queued_requests: int
    queued_images: int


@dataclass(frozen=True, slots=True)
class BudgetCheck:
    """The best variants within a budget, and the smallest budgets that are feasible.

    The `now` fields include the work that runs and waits; the `idle` fields do not. The smallest
    budgets are those of the fastest variant that has the requested quality.
    """

    now_variant: int | None
    """Variant id; None if no variant fits."""
    idle_variant: int | None
    wait_s: float
    smallest_now_s: float
    smallest_idle_s: float


def check_request(
    request: Request,
    candidates: CandidateFilter,
    latency: LatencyView,
    load: QueueLoad,
    images_ahead: float,
    settings: SchedulerSettings,
) -> None:
    """Raise the `RequestError` that rejects a request, or return if the request is admitted.

    Raises `InvalidArgument`, `VariantNotFound` or `QualityUnavailable` if no variant may answer it,
    `BudgetInfeasible` if its hard deadline is too early even on an idle engine, and `Overloaded` if
    its hard deadline is too early now or the queue is full.
    """
    if not 1 <= request.num_images <= latency.max_batch_size:
        raise InvalidArgument(
            "images",
            f"expected 1 to {latency.max_batch_size} images per request, got {request.num_images}",
        )
    _check_quality(request, candidates)
    fastest = candidates.for_request(request)[0]
    # Expected seconds reject a request only if it misses its hard deadline more likely than not.
    # Planned seconds put the feasible budget in the error on the safe side.
    alone_s = latency.expected(fastest, request.num_images) + settings.overhead_s
    left_s = request.deadlines.hard - request.arrival
    if left_s < alone_s:
        feasible_s = latency.seconds(fastest, request.num_images) + settings.overhead_s
        raise BudgetInfeasible(
            f"budget: expected at least {_format_us(alone_s)} us, the expected time of the "
            f"fastest allowed variant without other work, got {_format_us(left_s)} us "
            f"({request.deadlines.hard_source}); {_format_us(feasible_s)} us are kept with "
            f"probability {settings.attainment_probability:g}",
            min_feasible_us=_format_us(feasible_s),
        )
    wait_s = load.busy_s + estimate_work_s(images_ahead, candidates, latency)
    if request.deadlines.hard < load.now + wait_s + alone_s:
        raise Overloaded(
            f"budget: {_format_us(wait_s)} us of other work come first, "
            f"got {_format_us(left_s)} us",
            retry_after_s=wait_s,
        )
    _check_queue_limits(candidates, latency, load, settings)


def _check_queue_limits(
    candidates: CandidateFilter, latency: LatencyView, load: QueueLoad, settings: SchedulerSettings
) -> None:
    queued_s = estimate_work_s(load.queued_images, candidates, latency)
    if load.queued_requests >= settings.queue_limit_requests or queued_s > settings.queue_limit_s:
        raise Overloaded(
            f"the queue is full: {load.queued_requests} requests, about {queued_s:.2f} s of work",
            retry_after_s=queued_s,
        )


def check_budget(
    budget_s: float | None,
    min_quality: float,
    candidates: CandidateFilter,
    latency: LatencyView,
    load: QueueLoad,
    settings: SchedulerSettings,
) -> BudgetCheck:
    """Return the variants that one image could get within a budget; None means any budget.

    Raises `QualityUnavailable` if no variant has the requested quality.
    """
    _check_floor(min_quality, candidates, candidates.best)
    variants = candidates.for_quality(min_quality)
    wait_s = load.busy_s + estimate_work_s(load.queued_images, candidates, latency)
    needed_s = {v: latency.seconds(v, 1) + settings.overhead_s for v in variants}
    budget = float("inf") if budget_s is None else budget_s
    idle = [variant for variant in variants if needed_s[variant] <= budget]
    now = [variant for variant in variants if needed_s[variant] + wait_s <= budget]
    smallest = min(needed_s.values())
    return BudgetCheck(
        now_variant=now[-1] if now else None,
        idle_variant=idle[-1] if idle else None,
        wait_s=wait_s,
        smallest_now_s=smallest + wait_s,
        smallest_idle_s=smallest,
    )


def estimate_work_s(num_images: float, candidates: CandidateFilter, latency: LatencyView) -> float:
    """Return the least seconds that `num_images` take: full batches on the fastest variant."""
    fastest = candidates.for_quality()[0]
    if num_images <= latency.max_batch_size:
        return latency.expected(fastest, round(num_images)) if num_images >= 1 else 0.0
    return num_images * latency.expected(fastest, latency.max_batch_size) / latency.max_batch_size


def check_settings(settings: SchedulerSettings, quality: Mapping[int, float]) -> None:
    """Raise `InvalidArgument` if the model lacks a variant or the floor that the settings name."""
    for field in ("fixed_variant", "pinned_variant"):
        variant = getattr(settings, field)
        if variant is not None and variant not in quality:
            raise InvalidArgument(field, f"expected one of the model's variants, got {variant}")
    best = max(quality.values())
    if settings.min_quality > best:
        raise InvalidArgument(
            "min_quality",
            f"expected at most {best:.4f}, the best variant's, got {settings.min_quality}",
        )


def _check_quality(request: Request, candidates: CandidateFilter) -> None:
    if request.variant is not None and request.variant not in candidates.quality:
        raise VariantNotFound(
            f"variant_id: expected 0 to {max(candidates.quality)}, got {request.variant}",
            variant_id=str(request.variant),
        )
    best = candidates.best if request.variant is None else request.variant
    _check_floor(request.min_quality, candidates, best)


def _check_floor(min_quality: float, candidates: CandidateFilter, best: int) -> None:
    """Raise `QualityUnavailable` if `best` is below the floor of the request or the operator."""
    floor, highest = max(min_quality, candidates.floor), candidates.quality[best]
    if highest < floor:
        raise QualityUnavailable(
            f"min_quality: expected at most {highest:.4f}, got {floor:.4f}",
            max_quality=f"{highest:.6f}",
        )


def _format_us(seconds: float) -> str:
    return str(round(1e6 * seconds))

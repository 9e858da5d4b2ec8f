"""At the door: refuse at once what cannot be answered in time, and say what could be."""

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
    """The scheduler's state at one instant; `busy_s` is what the running batch still takes."""

    now: float
    busy_s: float
    queued_requests: int
    queued_images: int


@dataclass(frozen=True, slots=True)
class BudgetCheck:
    """Answer to "what could I have?"; variants are None where nothing fits.

    `now_*` counts the work that waits, `idle_*` does not; `smallest_*` are the smallest budgets
    that the fastest variant of the quality asked for needs.
    """

    now_variant: int | None
    idle_variant: int | None
    wait_s: float
    smallest_now_s: float
    smallest_idle_s: float


def admit(
    request: Request,
    candidates: CandidateFilter,
    latency: LatencyView,
    load: QueueLoad,
    images_ahead: float,
    settings: SchedulerSettings,
) -> None:
    """Raise the `RequestError` that says why a request is refused, if it is."""
    if not 1 <= request.num_images <= latency.max_batch_size:
        raise InvalidArgument(
            "images",
            f"expected 1 to {latency.max_batch_size} images a request, got {request.num_images}",
        )
    _check_quality(request, candidates)
    fastest = candidates.for_request(request)[0]
    # Refused is only what would more likely miss its limit than not; advice errs on the safe side.
    alone_s = latency.expected(fastest, request.num_images) + settings.overhead_s
    left_s = request.deadlines.hard - request.arrival
    if left_s < alone_s:
        enough_s = latency.seconds(fastest, request.num_images) + settings.overhead_s
        raise BudgetInfeasible(
            f"budget: the limit of {_us(left_s)} us ({request.deadlines.hard_source}) is below the "
            f"{_us(enough_s)} us that the fastest admissible variant takes alone",
            min_feasible_us=_us(enough_s),
        )
    wait_s = load.busy_s + work_s(images_ahead, candidates, latency)
    if request.deadlines.hard < load.now + wait_s + alone_s:
        raise Overloaded(
            f"budget: {_us(wait_s)} us of work come first, the limit leaves {_us(left_s)} us",
            retry_after_s=wait_s,
        )
    queued_s = work_s(load.queued_images, candidates, latency)
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
    """What a single image could have; raises `QualityUnavailable` if nothing is good enough."""
    _check_floor(min_quality, candidates, candidates.best)
    variants = candidates.for_quality(min_quality)
    wait_s = load.busy_s + work_s(load.queued_images, candidates, latency)
    needs = {s: latency.seconds(s, 1) + settings.overhead_s for s in variants}
    budget = float("inf") if budget_s is None else budget_s
    idle = [variant for variant in variants if needs[variant] <= budget]
    now = [variant for variant in variants if needs[variant] + wait_s <= budget]
    smallest = min(needs.values())
    return BudgetCheck(
        now_variant=now[-1] if now else None,
        idle_variant=idle[-1] if idle else None,
        wait_s=wait_s,
        smallest_now_s=smallest + wait_s,
        smallest_idle_s=smallest,
    )


def work_s(num_images: float, candidates: CandidateFilter, latency: LatencyView) -> float:
    """Seconds that this many num_images take at least: full batches on the fastest variant allowed."""
    fastest = candidates.for_quality()[0]
    if num_images <= latency.max_batch_size:
        return latency.expected(fastest, round(num_images)) if num_images >= 1 else 0.0
    return num_images * latency.expected(fastest, latency.max_batch_size) / latency.max_batch_size


def check_settings(settings: SchedulerSettings, quality: Mapping[int, float]) -> None:
    """Raise `InvalidArgument` if settings name a variant or a floor that the model does not have."""
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
    _check_floor(
        request.min_quality,
        candidates,
        candidates.best if request.variant is None else request.variant,
    )


def _check_floor(min_quality: float, candidates: CandidateFilter, available: int) -> None:
    """`available` is the best that the request may have."""
    floor, most = max(min_quality, candidates.floor), candidates.quality[available]
    if most < floor:
        raise QualityUnavailable(
            f"min_quality: {floor:.4f} asked for, {most:.4f} is the most there is",
            max_quality=f"{most:.6f}",
        )


def _us(seconds: float) -> str:
    return str(round(1e6 * seconds))

"""The live figures of one model at one replica: its last answers and its last five minutes."""

from __future__ import annotations

from ladderstitch.api.page.models import Body
from ladderstitch.hosting.registry import LoadedModel, TextModel
from ladderstitch.scheduling.latency_model import LatencyModel
from ladderstitch.telemetry.activity import BUCKET_S, Bucket, RecentActivity, RecentAnswer

WINDOW_S = 60.0
"""Seconds for which the page shows an answer as a point."""


def activity_of(model: LoadedModel) -> RecentActivity:
    """Return the record of a model."""
    metrics = model.metrics if isinstance(model, TextModel) else model.scheduler.metrics
    assert metrics.activity is not None, "it is kept where the page is on"
    return metrics.activity


def describe_figures(model: LoadedModel, replica: str, after: int) -> Body:
    """Return the figures of a model, and its answers with numbers above `after`.

    Sums and series cover the same five minutes. A value is None where there was nothing to measure:
    no budget, or no answer. `slowdown` is the time of a batch now over that at the start.
    """
    activity = activity_of(model)
    now, buckets = activity.clock(), activity.buckets()
    answers = [a for a in activity.answers if a.number > after and now - a.at <= WINDOW_S]
    return {
        "replica": replica,
        "model": model.name,
        "number": activity.num_answers,
        "slowdown": round(_latency_of(model).view.slowdown, 3),
        "queue": activity.queue_length,
        "window_s": BUCKET_S * len(buckets),
        "bucket_s": BUCKET_S,
        "total": _describe_bucket(activity.total()),
        "series": [_describe_bucket(bucket) for bucket in buckets],
        "answers": [_describe_answer(answer, now) for answer in answers],
    }


def _latency_of(model: LoadedModel) -> LatencyModel:
    if isinstance(model, TextModel):
        return model.scheduler.times.latency
    return model.scheduler.planner.latency


def _describe_bucket(bucket: Bucket) -> Body:
    return {
        "answered": bucket.answered,
        "rejected": bucket.rejected,
        "met": bucket.met,
        "missed": bucket.missed,
        "attainment": _rounded(bucket.attainment),
        "quality": _rounded(bucket.quality),
        "longest_queue": bucket.longest_queue,
    }


def _describe_answer(answer: RecentAnswer, now: float) -> Body:
    """Return an answer; `age_s` places it in time without the clocks of two machines."""
    return {
        "number": answer.number,
        "age_s": round(now - answer.at, 3),
        "variant_id": answer.variant,
        "quality": _rounded(answer.quality),
        "total_ms": round(1e3 * answer.seconds, 3),
        "token_ms": None if answer.token_s is None else round(1e3 * answer.token_s, 3),
        "budget_ms": None if answer.budget_s is None else round(1e3 * answer.budget_s, 6),
        "met": answer.met,
        "tokens_by_path": _tokens_by_path(answer),
    }


def _tokens_by_path(answer: RecentAnswer) -> dict[str, int]:
    """Return the number of tokens that each path computed."""
    tokens: dict[str, int] = {}
    for span in answer.spans:
        tokens[span.name] = tokens.get(span.name, 0) + span.num_tokens
    return tokens


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 5)

"""Baseline policies: Fixed, MaxQuality, MaxBatch, ModelSwitching and SuperServe's SlackFit."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.latency_model import LatencyView
from ladderstitch.scheduling.requests import Request
from ladderstitch.vision.scheduler.policies.base import Decision, fill_batch, late_batch, slack
from ladderstitch.vision.scheduler.policies.forecast import ArrivalForecast

MAX_UTILISATION = 0.8
"""Share of a variant's capacity that `ModelSwitching` uses at most."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """The policy that always uses the fixed variant, with the largest batch that is on time."""

    candidates: CandidateFilter
    overhead_s: float

    def __call__(self, queue: Sequence[Request], latency: LatencyView, now: float) -> Decision:
        """Return the next batch."""
        head = queue[0]
        variant = self.candidates.for_request(head)[0]
        left = slack(queue, self.candidates, latency, now, self.overhead_s)
        batch_size = latency.largest_fit(variant, left)
        # A late first request gains nothing from a small batch, and a large one clears the queue.
        batch_size = batch_size if batch_size >= head.num_images else latency.max_batch_size
        return Decision(fill_batch(queue, variant, batch_size, self.candidates), variant)


@dataclass(frozen=True, slots=True)
class MaxQuality:
    """The policy of the best variant that fits for the first request, then the largest batch."""

    candidates: CandidateFilter
    overhead_s: float

    def __call__(self, queue: Sequence[Request], latency: LatencyView, now: float) -> Decision:
        """Return the next batch."""
        head = queue[0]
        left = slack(queue, self.candidates, latency, now, self.overhead_s)
        for variant in reversed(self.candidates.for_request(head)):
            batch_size = latency.largest_fit(variant, left)
            if batch_size >= head.num_images:
                return Decision(fill_batch(queue, variant, batch_size, self.candidates), variant)
        return late_batch(queue, self.candidates, latency, now, self.overhead_s)


@dataclass(frozen=True, slots=True)
class MaxBatch:
    """The policy of the largest batch that fits on the fastest variant, then the best variant."""

    candidates: CandidateFilter
    overhead_s: float

    def __call__(self, queue: Sequence[Request], latency: LatencyView, now: float) -> Decision:
        """Return the next batch."""
        head = queue[0]
        left = slack(queue, self.candidates, latency, now, self.overhead_s)
        candidates = self.candidates.for_request(head)
        batch_size = latency.largest_fit(candidates[0], left)
        if batch_size < head.num_images:
            return late_batch(queue, self.candidates, latency, now, self.overhead_s)
        batch = fill_batch(queue, candidates[0], batch_size, self.candidates)
        size = sum(request.num_images for request in batch)
        for variant in reversed(candidates):
            fits = latency.seconds(variant, size) <= left
            if fits and all(self.candidates.allows(request, variant) for request in batch):
                return Decision(batch, variant)
        return Decision(batch, candidates[0])


@dataclass(frozen=True, slots=True)
class ModelSwitching:
    """The policy of the best variant whose full batches sustain the recent rate of requests."""

    candidates: CandidateFilter
    overhead_s: float
    forecast: ArrivalForecast

    def __call__(self, queue: Sequence[Request], latency: LatencyView, now: float) -> Decision:
        """Return the next batch."""
        head = queue[0]
        candidates = self.candidates.for_request(head)
        left_s = slack(queue, self.candidates, latency, now, self.overhead_s)
        full, variant = latency.max_batch_size, candidates[0]
        for slower in candidates:
            if self.forecast.rate * latency.seconds(slower, full) <= MAX_UTILISATION * full:
                variant = slower
        batch_size = latency.largest_fit(variant, left_s)
        if batch_size < head.num_images:
            variant, batch_size = candidates[0], latency.largest_fit(candidates[0], left_s)
        if batch_size < head.num_images:
            return late_batch(queue, self.candidates, latency, now, self.overhead_s)
        return Decision(fill_batch(queue, variant, batch_size, self.candidates), variant)


@dataclass(frozen=True, slots=True)
class Bucket:
    """A latency bucket of SlackFit: its upper edge in profiled seconds, a batch and a variant."""

    upper_s: float
    batch_size: int
    variant: int


def slackfit_buckets(candidates: Sequence[int], latency: LatencyView, count: int) -> list[Bucket]:
    """Return the bucket table of SuperServe (NSDI'25), ascending and without empty buckets.

    [l(fastest, 1), l(slowest, max_batch_size)] is cut into `count` equal parts. Every pair of
    variant and batch size belongs to the part that contains its profiled latency. Each part keeps
    its largest batch, and of equal batches the one of highest quality. `candidates` are in order of
    quality.
    """
    low = latency.profiled[candidates[0]][1]
    high = max(latency.profiled[variant][latency.max_batch_size] for variant in candidates)
    width = (high - low) / count
    kept: dict[int, Bucket] = {}
    for variant in candidates:
        for batch_size in range(1, latency.max_batch_size + 1):
            seconds = latency.profiled[variant][batch_size]
            index = min(count - 1, int((seconds - low) / width)) if width > 0 else 0
            if index not in kept or batch_size >= kept[index].batch_size:
                kept[index] = Bucket(low + (index + 1) * width, batch_size, variant)
    return [kept[index] for index in sorted(kept)]


@dataclass(frozen=True, slots=True)
class SlackFit:
    """SuperServe's policy (NSDI'25): the first request's slack selects a bucket of the table.

    The bucket gives the batch size and the variant. A table is created once for each set of
    candidates. The online slowdown scales all latencies alike, so it divides the slack instead of
    changing the table.
    """

    candidates: CandidateFilter
    buckets: int
    overhead_s: float
    _tables: dict[tuple[int, ...], tuple[list[float], list[Bucket]]] = field(default_factory=dict)

    def __call__(self, queue: Sequence[Request], latency: LatencyView, now: float) -> Decision:
        """Return the next batch."""
        head = queue[0]
        candidates = self.candidates.for_request(head)
        left = slack(queue, self.candidates, latency, now, self.overhead_s)
        edges, table = self._table(candidates, latency)
        for index in reversed(range(bisect_right(edges, latency.to_profile_seconds(left)))):
            choice = table[index]
            if choice.batch_size >= head.num_images:
                return Decision(
                    fill_batch(queue, choice.variant, choice.batch_size, self.candidates),
                    choice.variant,
                )
        batch_size = latency.largest_fit(candidates[0], left)
        if batch_size >= head.num_images:  # between the fastest variant and the first bucket's edge
            return Decision(
                fill_batch(queue, candidates[0], batch_size, self.candidates), candidates[0]
            )
        return late_batch(queue, self.candidates, latency, now, self.overhead_s)

    def _table(
        self, candidates: tuple[int, ...], latency: LatencyView
    ) -> tuple[list[float], list[Bucket]]:
        """Return the upper edges and the buckets for a set of candidates."""
        if candidates not in self._tables:
            buckets = slackfit_buckets(candidates, latency, self.buckets)
            self._tables[candidates] = ([bucket.upper_s for bucket in buckets], buckets)
        return self._tables[candidates]

"""The latency of a batch: the measured profile, corrected by recent batches on this machine."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TypedDict

from ladderstitch.scheduling.profiles import LatencyProfile

SLOWDOWN_WINDOW = 7
"""Batches whose median ratio is the slowdown: three outliers in a row do not move it."""
RESIDUAL_WINDOW = 256
"""Batches whose residuals the tail factor is a quantile of."""
OVERHEAD_WINDOW = 64
"""Batches whose dispatch overhead is remembered."""
TAIL_UPDATE_INTERVAL = 8
"""Batches between two updates of the tail factor, because sorting takes some microseconds."""
MAX_TAIL = 4.0
"""Largest tail factor: planning for a longer tail would reject requests that mostly succeed."""
IDLE_REJECTION_DECAY = 0.98
"""Factor on the slowdown for each request that is rejected while nothing else runs or waits."""
MIN_SLOWDOWN = 0.5
"""Lowest slowdown that this decay leads to: the profile may come from a busy machine."""


@dataclass(frozen=True, slots=True)
class LatencyView:
    """A snapshot of the latency model that policies plan with."""

    profiled: Mapping[int, tuple[float, ...]]
    """Median seconds of the profile, `profiled[variant][batch_size]`; index 0 is unused.

    They rise with the batch size, which is 1 to `max_batch_size`.
    """
    max_batch_size: int
    slowdown: float
    """Current seconds of this machine over the profile's."""
    tail: float
    """Seconds at the planned quantile over expected seconds, 1 to `MAX_TAIL`."""
    residuals: tuple[float, ...] = (1.0,)
    """Actual over expected seconds of recent batches, ascending."""
    dispatch_overhead_s: float = 0.0
    """Seconds that a batch takes in addition to compute."""

    def expected(self, variant: int, batch_size: int) -> float:
        """Return the expected seconds of compute of a batch."""
        return self.profiled[variant][batch_size] * self.slowdown

    def seconds(self, variant: int, batch_size: int) -> float:
        """Return the seconds to plan with: the batch stays below them with the set probability."""
        return self.profiled[variant][batch_size] * self.slowdown * self.tail

    def to_profile_seconds(self, slack_s: float) -> float:
        """Return the slack in the profile's seconds, to compare with `profiled`."""
        return slack_s / (self.slowdown * self.tail)

    def expected_misses(self, variant: int, batch_size: int, slacks_s: Sequence[float]) -> float:
        """Return how many of these slacks a batch exceeds on average, as recent batches did."""
        expected_s, residuals = self.profiled[variant][batch_size] * self.slowdown, self.residuals
        number = len(residuals)
        return sum([1.0 - bisect_right(residuals, s / expected_s) / number for s in slacks_s])

    def largest_fit(self, variant: int, slack_s: float) -> int:
        """Return the largest batch size that fits into the slack; 0 if no batch fits."""
        return bisect_right(self.profiled[variant], self.to_profile_seconds(slack_s), lo=1) - 1


class DispatchOverhead:
    """The seconds between dispatch and answer that are not compute, such as process switches.

    They depend neither on the variant nor on the batch size. So they are learned separately, as
    the 95th percentile of the last `OVERHEAD_WINDOW` batches.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=OVERHEAD_WINDOW)
        self._num_observed = 0
        self.seconds = 0.0

    def observe(self, seconds: float) -> None:
        """Learn the overhead of one batch; a negative value counts as 0."""
        self._recent.append(max(0.0, seconds))
        self._num_observed += 1
        if self._num_observed % TAIL_UPDATE_INTERVAL == 0:
            self.seconds = sorted(self._recent)[int(0.95 * len(self._recent))]


class ResidualStats(TypedDict):
    """The fields of a `LatencyView` that the residuals determine."""

    residuals: tuple[float, ...]
    tail: float


class LatencyModel:
    """A profile and its online correction.

    The correction is one multiplicative slowdown for the whole machine (co-tenants, clock rates) as
    in ALERT (ATC'20), times a tail factor, which is a quantile of recent residuals. Each
    observation replaces `view`; a view never changes.
    """

    def __init__(self, profile: LatencyProfile, probability: float = 0.99) -> None:
        self.profile = profile
        self.probability = probability
        self._ratios: deque[float] = deque(maxlen=SLOWDOWN_WINDOW)
        self._residuals: deque[float] = deque([profiled_tail(profile)], maxlen=RESIDUAL_WINDOW)
        self._num_observed = 0
        self._dispatch_overhead = DispatchOverhead()
        self.view = LatencyView(
            profiled={variant: _interpolate(profile, variant) for variant in profile.variants},
            max_batch_size=profile.max_batch_size,
            slowdown=1.0,
            tail=profiled_tail(profile),
            residuals=(profiled_tail(profile),),
        )

    def observe(self, variant: int, batch_size: int, actual_s: float) -> float:
        """Learn from one batch; return actual over expected seconds."""
        error = actual_s / self.view.expected(variant, batch_size)
        # Without ratios the slowdown is an assumption, and `error` does not describe the machine.
        is_assumed = not self._ratios
        self._ratios.append(actual_s / self.view.profiled[variant][batch_size])
        self._update(slowdown=median(self._ratios), residual=1.0 if is_assumed else error)
        return error

    def observe_dispatch_overhead(self, seconds: float) -> None:
        """Learn the seconds that one batch took in addition to compute."""
        self._dispatch_overhead.observe(seconds)
        if self._dispatch_overhead.seconds != self.view.dispatch_overhead_s:
            self.view = replace(self.view, dispatch_overhead_s=self._dispatch_overhead.seconds)

    def decay_after_idle_rejection(self) -> None:
        """Lower the slowdown after a request was rejected for its time on an idle engine.

        Without running batches there is nothing to observe, so one slow period could cause
        rejections forever. Each rejection on an idle engine decays the slowdown estimate, until
        a request is admitted. Then that request's batch alone determines the slowdown.
        """
        self._ratios.clear()
        slowdown = self.view.slowdown
        decayed = max(MIN_SLOWDOWN, slowdown * IDLE_REJECTION_DECAY)
        self._update(slowdown=min(slowdown, decayed), residual=1.0)

    def set_probability(self, probability: float) -> None:
        """Plan with another probability (0 to 1) that a batch ends within `view.seconds`."""
        if probability != self.probability:
            self.probability = probability
            self.view = replace(self.view, **self._residual_stats())

    def _update(self, slowdown: float, residual: float) -> None:
        self._residuals.append(residual)
        self._num_observed += 1
        if self._num_observed % TAIL_UPDATE_INTERVAL:
            self.view = replace(self.view, slowdown=slowdown)
        else:
            self.view = replace(self.view, slowdown=slowdown, **self._residual_stats())

    def _residual_stats(self) -> ResidualStats:
        """Return the residuals in ascending order and their quantile at `probability`."""
        ordered = tuple(sorted(self._residuals))
        rank = min(len(ordered) - 1, int(self.probability * len(ordered)))
        return {"residuals": ordered, "tail": min(max(1.0, ordered[rank]), MAX_TAIL)}


def profiled_tail(profile: LatencyProfile) -> float:
    """Return the profile's median ratio of p99 to median: the tail before any observation."""
    ratios = [
        p99 / middle
        for latency in profile.variants.values()
        for p99, middle in zip(latency.p99_s, latency.median_s, strict=True)
    ]
    return min(max(1.0, median(ratios)), MAX_TAIL)


def _interpolate(profile: LatencyProfile, variant: int) -> tuple[float, ...]:
    """Return median seconds at every batch size, interpolated linearly and never falling."""
    sizes, seconds = profile.batch_sizes, profile.variants[variant].median_s
    dense = [0.0, seconds[0]]
    for index in range(1, len(sizes)):
        low, high = sizes[index - 1], sizes[index]
        start, end = dense[-1], max(dense[-1], seconds[index])
        dense += [
            start + (end - start) * (batch_size - low) / (high - low)
            for batch_size in range(low + 1, high + 1)
        ]
    return tuple(dense)

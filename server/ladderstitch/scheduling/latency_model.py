"""How long a batch will take: the profile, corrected by what this machine does right now."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import TypedDict

from ladderstitch.scheduling.profiles import LatencyProfile

RECENT = 7
"""Observations whose median is the slow-down: three outliers in a row do not move it."""
RESIDUALS = 256
"""Observations that the tail factor is the quantile of."""
TAIL_EVERY = 8
"""Observations between two looks at the tail (sorting costs some microseconds)."""
TAIL_LIMIT = 4.0
"""Largest tail factor: beyond it, planning for the tail would refuse what mostly succeeds."""
DOUBT = 0.98
"""What one refusal without any other work takes off the slow-down."""
DOUBT_FLOOR = 0.5
"""Least slow-down that doubt alone leads to: the profile itself may be from a busy moment."""


@dataclass(frozen=True, slots=True)
class LatencyView:
    """What a policy may know of latency at one instant; seconds for any batch_size in 1..max_batch_size.

    `profiled[variant][batch_size]` is the profile's median, rising with batch_size (index 0 is unused);
    `slowdown` is the machine's at present, `tail` what the wanted quantile costs on top.
    """

    profiled: Mapping[int, tuple[float, ...]]
    max_batch_size: int
    slowdown: float
    tail: float
    residuals: tuple[float, ...] = (1.0,)  # actual over expected seconds, recent, ascending
    dispatch_overhead_s: float = 0.0  # what a batch takes beyond computing

    def expected(self, variant: int, batch_size: int) -> float:
        return self.profiled[variant][batch_size] * self.slowdown

    def seconds(self, variant: int, batch_size: int) -> float:
        """Seconds to plan with: what the batch stays below with the probability asked for."""
        return self.profiled[variant][batch_size] * self.slowdown * self.tail

    def to_profile_seconds(self, slack_s: float) -> float:
        """Slack in the profile's seconds, to compare with `profiled` directly."""
        return slack_s / (self.slowdown * self.tail)

    def chance(self, variant: int, batch_size: int, slack_s: float) -> float:
        """How likely a batch is over within the slack, by the recent residuals; 0 to 1."""
        allowed = slack_s / (self.profiled[variant][batch_size] * self.slowdown)
        return bisect_right(self.residuals, allowed) / len(self.residuals)

    def largest_fit(self, variant: int, slack_s: float) -> int:
        """Rows that fit into the slack on a variant; 0 if not even one does."""
        return bisect_right(self.profiled[variant], self.to_profile_seconds(slack_s), lo=1) - 1


class DispatchOverhead:
    """Seconds between dispatch and answer that are not compute: changing processes, waking up.

    They neither shrink with the variant nor grow with the batch, so they are learned apart, as the
    95th percentile of recent batches.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=64)
        self._learned = 0
        self.seconds = 0.0

    def observe(self, seconds: float) -> None:
        self._recent.append(max(0.0, seconds))
        self._learned += 1
        if self._learned % TAIL_EVERY == 0:
            self.seconds = sorted(self._recent)[int(0.95 * len(self._recent))]


class ResidualStats(TypedDict):
    """The fields of a view that the residuals determine."""

    residuals: tuple[float, ...]
    tail: float


class LatencyModel:
    """A profile and its online correction; `view` is replaced, never changed, by `observe`.

    One multiplicative slow-down for the whole machine (co-tenants, clocks) as in ALERT (ATC'20),
    times a tail factor: the wanted quantile of recent residuals.
    """

    def __init__(self, profile: LatencyProfile, probability: float = 0.99) -> None:
        self.profile = profile
        self.probability = probability
        self._ratios: deque[float] = deque(maxlen=RECENT)
        self._residuals: deque[float] = deque([profiled_tail(profile)], maxlen=RESIDUALS)
        self._learned = 0
        self._dispatch_overhead = DispatchOverhead()
        self.view = LatencyView(
            profiled={s: _dense(profile, s) for s in profile.variants},
            max_batch_size=profile.max_batch,
            slowdown=1.0,
            tail=profiled_tail(profile),
            residuals=(profiled_tail(profile),),
        )

    def observe(self, variant: int, batch_size: int, actual_s: float) -> float:
        """Learn from one batch; returns actual over expected seconds."""
        error = actual_s / self.view.expected(variant, batch_size)
        doubted = not self._ratios  # then `error` tells of the doubt, not of the machine
        self._ratios.append(actual_s / self.view.profiled[variant][batch_size])
        self._learn(slowdown=median(self._ratios), residual=1.0 if doubted else error)
        return error

    def observe_dispatch_overhead(self, seconds: float) -> None:
        """Learn what one batch took beyond computing."""
        self._dispatch_overhead.observe(seconds)
        if self._dispatch_overhead.seconds != self.view.dispatch_overhead_s:
            self.view = replace(self.view, dispatch_overhead_s=self._dispatch_overhead.seconds)

    def decay_after_idle_rejection(self) -> None:
        """A request was refused for its time although nothing else ran.

        Without work there is nothing to observe, so one slow spell could shut the door for ever.
        Each such refusal brings the correction a step back, until a request is let in; what that
        one takes counts alone.
        """
        self._ratios.clear()
        slowdown = self.view.slowdown
        self._learn(slowdown=min(slowdown, max(DOUBT_FLOOR, slowdown * DOUBT)), residual=1.0)

    def set_probability(self, probability: float) -> None:
        """How sure `view.seconds` is to be from now on."""
        if probability != self.probability:
            self.probability = probability
            self.view = replace(self.view, **self._spread())

    def _learn(self, slowdown: float, residual: float) -> None:
        self._residuals.append(residual)
        self._learned += 1
        if self._learned % TAIL_EVERY:
            self.view = replace(self.view, slowdown=slowdown)
        else:
            self.view = replace(self.view, slowdown=slowdown, **self._spread())

    def _spread(self) -> ResidualStats:
        """The residuals in order, and their quantile that `seconds` plans for."""
        ordered = tuple(sorted(self._residuals))
        rank = min(len(ordered) - 1, int(self.probability * len(ordered)))
        return {"residuals": ordered, "tail": min(max(1.0, ordered[rank]), TAIL_LIMIT)}


def profiled_tail(profile: LatencyProfile) -> float:
    """The profile's typical ratio of p99 to median: the tail factor before any observation."""
    ratios = [
        p99 / middle
        for latency in profile.variants.values()
        for p99, middle in zip(latency.p99_s, latency.median_s, strict=True)
    ]
    return min(max(1.0, median(ratios)), TAIL_LIMIT)


def _dense(profile: LatencyProfile, variant: int) -> tuple[float, ...]:
    """Median seconds at every number of batch_size, interpolated linearly and kept rising."""
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

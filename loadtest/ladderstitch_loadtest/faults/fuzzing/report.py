"""The result of a fuzzing run: its figures, its limits, and the lines that it prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ladderstitch_loadtest.faults.fuzzing.campaign import CampaignResult
from ladderstitch_loadtest.faults.fuzzing.good_callers import GoodSample
from ladderstitch_loadtest.faults.fuzzing.observations import Footprint

MAX_LATE_S = 0.1
"""Largest latency of a good answer over the quiet p99."""
MAX_LAG_S = 0.05
"""Largest p99 of the delay of the server's event loop."""
MAX_GROWTH, MAX_GROWTH_MB = 0.05, 16.0
"""Largest growth of memory: this share, and in addition this number of MiB."""


@dataclass(frozen=True, slots=True)
class GoodLatency:
    """Good callers in a quiet or a busy time: answers, wrong ones, latencies in ms."""

    answers: int
    wrong: int
    p50_ms: float
    p99_ms: float
    max_ms: float


def good_latency(samples: Sequence[GoodSample]) -> GoodLatency:
    """Return the figures of samples, of which there is at least one."""
    latencies = 1e3 * np.array([sample.latency_s for sample in samples])
    p50, p99 = np.quantile(latencies, [0.5, 0.99])
    return GoodLatency(
        answers=len(samples),
        wrong=sum(bool(sample.fault) for sample in samples),
        p50_ms=round(float(p50), 2),
        p99_ms=round(float(p99), 2),
        max_ms=round(float(latencies.max()), 2),
    )


@dataclass(frozen=True, slots=True)
class FuzzReport:
    """All figures of a run; `lag_p99_s` is NaN if the server does not expose the metric."""

    seed: int
    seconds: float
    campaign: CampaignResult
    quiet: GoodLatency
    busy: GoodLatency
    late: int
    good_faults: tuple[str, ...]
    before: Footprint
    after: Footprint
    lag_p99_s: float

    def failures(self, *, timing: bool) -> list[str]:
        """Return a line for each limit that the run exceeds; `timing`: those of latency, too."""
        lines = []
        if self.campaign.num_wrong:
            lines.append(f"{self.campaign.num_wrong} answers are wrong")
        if wrong := self.quiet.wrong + self.busy.wrong:
            lines.append(f"{wrong} good requests got a wrong answer or none")
        limit_mb = self.before.memory_mb * (1 + MAX_GROWTH) + MAX_GROWTH_MB
        if self.after.memory_mb > limit_mb:
            lines.append(
                f"memory: expected at most {limit_mb:.1f} MiB, got {self.after.memory_mb:.1f}"
            )
        for name in ("descriptors", "processes"):
            old, new = getattr(self.before, name), getattr(self.after, name)
            if new > old:
                lines.append(f"{name}: expected at most {old}, got {new}")
        if timing and self.late:
            lines.append(f"{self.late} good answers took over 100 ms longer than the quiet p99")
        if timing and self.lag_p99_s > MAX_LAG_S:
            lines.append(f"event loop: expected a p99 of at most 50 ms, got {self.lag_p99_s} s")
        return lines

    def to_dict(self) -> dict[str, object]:
        """Return the figures for a result file."""
        found = self.campaign
        return {
            "seed": self.seed,
            "requests": found.requests,
            "seconds": round(self.seconds, 1),
            "slowest_s": round(found.slowest_s, 2),
            "wrong": found.num_wrong,
            "faults": dict(found.faults.most_common()),
            "ends": dict(sorted(found.ends.items())),
            "kinds": dict(sorted(found.kinds.items())),
            "good_quiet": asdict(self.quiet),
            "good_busy": asdict(self.busy),
            "good_late": self.late,
            "good_faults": list(self.good_faults),
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "event_loop_lag_p99_s": self.lag_p99_s,
            "wrong_answers": [asdict(one) for one in found.wrong],
        }


def summarise_good(
    samples: Sequence[GoodSample], busy_from: float, busy_until: float
) -> tuple[GoodLatency, GoodLatency, int, tuple[str, ...]]:
    """Return figures of the quiet and the busy time, late answers, and the faults of answers."""
    quiet = [sample for sample in samples if sample.at < busy_from]
    busy = [sample for sample in samples if busy_from <= sample.at <= busy_until]
    figures = good_latency(quiet), good_latency(busy)
    limit_s = figures[0].p99_ms / 1e3 + MAX_LATE_S
    late = sum(sample.latency_s > limit_s for sample in busy)
    faults = tuple(f"{sample.kind}: {sample.fault}" for sample in samples if sample.fault)
    return *figures, late, faults[:100]


def group_faults(found: CampaignResult) -> list[tuple[int, str, int]]:
    """Return (count, fault, index of the first case) of similar faults, the commonest first."""
    first: dict[str, int] = {}
    for wrong in found.wrong:
        first.setdefault(wrong.similarity, wrong.index)
    return [(count, fault, first[fault]) for fault, count in found.faults.most_common()]

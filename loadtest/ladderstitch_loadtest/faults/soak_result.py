"""The result of a soak test: how requests ended, and memory over time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

ALLOWED = {
    "images": {"OK"},
    "hard": {"OK", "OVERLOADED", "BUDGET_INFEASIBLE", "EXPIRED_IN_QUEUE", "EXPIRED_IN_COMPUTE"},
    "text": {"OK"},
    "abandoned": {"abandoned", "OK"},
    "cancelled": {"cancelled", "OK"},
    "bad": {"INVALID_ARGUMENT", "MODEL_NOT_FOUND", "VARIANT_NOT_FOUND", "QUALITY_UNAVAILABLE"},
}
"""How a request of each kind may end: `OK`, a reason of the server, or what the caller did."""
ALLOWED_AROUND_RESTARTS = {"ENGINE_RESTARTING", "UNAVAILABLE"}
"""Reasons allowed for a request that overlaps a disturbance.

Its worker was lost twice, or its replica died during a stream.
"""


@dataclass(frozen=True, slots=True)
class SoakSample:
    """The state at one time: seconds since the start, and unshared memory in MiB.

    `ended` counts the requests that ended since the last sample, and the latencies are those of
    images among them.
    """

    at_s: float
    gateway_mb: float
    survivor_mb: float
    callers_mb: float
    ended: int
    image_p50_ms: float
    image_p99_ms: float


@dataclass(slots=True)
class SoakResult:
    """The whole result.

    `ends` counts requests by kind and end. `unexplained` holds a line for each request whose end is
    not allowed. `disturbances` holds (seconds since the start, kind). `left_over` is the number of
    requests that replicas still hold after the last caller stopped.
    """

    seconds: float
    ends: dict[str, dict[str, int]]
    unexplained: list[str]
    longest_s: float
    disturbances: list[tuple[float, str]]
    left_over: float
    samples: list[SoakSample] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """The number of requests that ended."""
        return sum(count for kinds in self.ends.values() for count in kinds.values())

    def slope_mb_per_hour(self, process: str) -> float:
        """Return the growth of a process's memory in MiB/h over the second half of the run.

        The slope is fitted by least squares. `process` is gateway, survivor or callers.
        """
        late = [s for s in self.samples if s.at_s >= self.seconds / 2]
        hours = [s.at_s / 3600 for s in late]
        return float(np.polyfit(hours, [getattr(s, f"{process}_mb") for s in late], 1)[0])

    def growth_mb(self, process: str) -> float:
        """Return the growth in MiB from the mean of the second quarter to that of the last one."""
        sizes = np.array([getattr(s, f"{process}_mb") for s in self.samples])
        quarter = len(sizes) // 4
        return float(sizes[-quarter:].mean() - sizes[quarter : 2 * quarter].mean())

    def to_dict(self) -> dict[str, object]:
        """Return the figures for a result file, memory thinned out to about 60 samples."""
        return {
            "seconds": self.seconds,
            "requests": self.requests,
            "ends": self.ends,
            "unexplained": self.unexplained,
            "longest_s": round(self.longest_s, 2),
            "left_over": self.left_over,
            "memory_mb_per_hour": {
                process: round(self.slope_mb_per_hour(process), 1)
                for process in ("gateway", "survivor", "callers")
            },
            "disturbances": dict(Counter(kind for _, kind in self.disturbances)),
            "memory_mb": [
                [round(s.at_s), round(s.gateway_mb, 1), round(s.survivor_mb, 1)]
                for s in self.samples[:: max(1, len(self.samples) // 60)]
            ],
        }

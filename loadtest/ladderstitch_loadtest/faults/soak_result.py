"""What a soak saw: how requests ended, and how memory went."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class Sample:
    """The state at a time: seconds since the start, MiB, answers and their latencies since."""

    at_s: float
    gateway_mb: float
    survivor_mb: float
    callers_mb: float
    ended: int
    image_p50_ms: float
    image_p99_ms: float


@dataclass(slots=True)
class SoakResult:
    seconds: float
    ends: dict[str, dict[str, int]]
    unexplained: list[str]
    longest_s: float
    disturbances: list[tuple[float, str]]
    left_over: float
    samples: list[Sample] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return sum(count for kinds in self.ends.values() for count in kinds.values())

    def slope_mb_per_hour(self, which: str) -> float:
        """Growth of a process's memory over the second half, by least squares."""
        late = [s for s in self.samples if s.at_s >= self.seconds / 2]
        hours = [s.at_s / 3600 for s in late]
        return float(np.polyfit(hours, [getattr(s, f"{which}_mb") for s in late], 1)[0])

    def grown_mb(self, which: str) -> float:
        """Between the means of the second and of the last quarter."""
        sizes = np.array([getattr(s, f"{which}_mb") for s in self.samples])
        quarter = len(sizes) // 4
        return float(sizes[-quarter:].mean() - sizes[quarter : 2 * quarter].mean())

    def to_dict(self) -> dict[str, object]:
        return {
            "seconds": self.seconds,
            "requests": self.requests,
            "ends": self.ends,
            "unexplained": self.unexplained,
            "longest_s": round(self.longest_s, 2),
            "left_over": self.left_over,
            "memory_mb_per_hour": {
                which: round(self.slope_mb_per_hour(which), 1)
                for which in ("gateway", "survivor", "callers")
            },
            "disturbances": dict(Counter(kind for _, kind in self.disturbances)),
            "memory_mb": [
                [round(s.at_s), round(s.gateway_mb, 1), round(s.survivor_mb, 1)]
                for s in self.samples[:: max(1, len(self.samples) // 60)]
            ],
        }

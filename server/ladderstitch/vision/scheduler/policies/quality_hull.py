"""What a row can earn, by how many seconds of the engine there are for it.

The fluid limit of serving under load: with u seconds for every row, the best mix of variants lies
on the concave hull of (seconds a row, quality). Below the cheapest variant's cost there is not
enough for everyone, and quality falls to 0 in proportion.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

TURNS_OUT = ((0.7, 0.02), (0.8, 0.05), (0.9, 0.23), (1.0, 0.4), (1.1, 0.3))
"""What there is, over what was expected, when requests come in bursts: equally likely."""
SPELLS = 24
"""Longest batch durations that the hull is worked out for."""

Point = tuple[float, float]
"""Seconds a row, quality."""


@dataclass(frozen=True, slots=True)
class QualityHull:
    """Piecewise linear: beyond `costs_s[i-1]` a row earns `bases[i] + slopes[i] * u`."""

    costs_s: tuple[float, ...]
    bases: tuple[float, ...]
    slopes: tuple[float, ...]

    def quality(self, seconds_per_row: float) -> float:
        """Mean quality that so much time allows."""
        place = bisect_right(self.costs_s, seconds_per_row)
        return self.bases[place] + self.slopes[place] * seconds_per_row

    def smoothed(self) -> QualityHull:
        """The mean over how much time there may turn out to be; it is concave too."""
        breaks = sorted({cost / share for cost in self.costs_s for share, _ in TURNS_OUT})
        return QualityHull.over(
            [(u, sum(w * self.quality(share * u) for share, w in TURNS_OUT)) for u in breaks]
        )

    @classmethod
    def over(cls, upper: Sequence[Point]) -> QualityHull:
        """Through the points of a concave hull, cheapest first."""
        slopes = [0.0, *(_slope(a, b) for a, b in pairwise(upper)), 0.0]
        slopes[0] = upper[0][1] / upper[0][0]
        bases = [0.0, *(q - m * c for (c, q), m in zip(upper, slopes[1:], strict=True))]
        return cls(tuple(cost for cost, _ in upper), tuple(bases), tuple(slopes))


@dataclass(frozen=True, slots=True)
class QualityHulls:
    """Hulls by the longest time that a batch may take, in the profile's seconds.

    `efficient` are the variants on any of them; the others are never worth their time.
    """

    longest_s: tuple[float, ...]
    hulls: tuple[QualityHull, ...]
    efficient: frozenset[int]

    @classmethod
    def of(
        cls,
        frontier: Sequence[int],
        quality: Mapping[int, float],
        profiled: Mapping[int, tuple[float, ...]],
    ) -> QualityHulls:
        """`profiled` as in `LatencyView`."""
        low = profiled[frontier[0]][1]
        ratio = max(profiled[variant][-1] for variant in frontier) / low
        longest = tuple(low * ratio ** (i / (SPELLS - 1)) for i in range(SPELLS))
        hulls: list[QualityHull] = []
        efficient: set[int] = set()
        for spell_s in longest:
            points = {
                (_cheapest(profiled[variant], spell_s), quality[variant]): variant
                for variant in frontier
            }
            upper = _upper_hull(sorted(points, key=lambda point: (point[0], -point[1])))
            hulls.append(QualityHull.over(upper).smoothed())
            efficient.update(points[point] for point in upper)
        return cls(longest, tuple(hulls), frozenset(efficient))

    def hull(self, longest_s: float) -> QualityHull:
        """For batches that take no longer than this."""
        return self.hulls[max(0, bisect_right(self.longest_s, longest_s) - 1)]


def _cheapest(seconds: Sequence[float], longest_s: float) -> float:
    """Least seconds a row, in batches that take no longer; a single row always may."""
    fits = max(1, bisect_right(seconds, longest_s, lo=1) - 1)
    return min(seconds[batch_size] / batch_size for batch_size in range(1, fits + 1))


def _upper_hull(points: Sequence[Point]) -> list[Point]:
    upper = [points[0]]
    for point in points[1:]:
        if point[1] <= upper[-1][1]:
            continue
        while len(upper) > 1 and _slope(upper[-2], upper[-1]) <= _slope(upper[-1], point):
            upper.pop()
        upper.append(point)
    return upper


def _slope(a: Point, b: Point) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])

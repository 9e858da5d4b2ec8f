"""What a second of the engine is worth, by how many seconds there are for each row.

The fluid limit of serving under load: with u seconds for every row, the best mix of stitches lies
on the concave hull of (seconds a row, quality), and the slope there is what one more second earns.
A batch is worth running on a better stitch if it gains more than its extra seconds cost at that
price.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SPELLS = 24
"""Longest batch durations that the hull is worked out for."""


@dataclass(frozen=True, slots=True)
class Hull:
    """Prices between the hull's points: below `costs_s[i]` a second is worth `prices[i]`.

    The last price, beyond the dearest point, is 0; the first, below the cheapest one, is what an
    answer on the cheapest earns in a second: there is not enough for everyone.
    """

    costs_s: tuple[float, ...]
    prices: tuple[float, ...]
    nets: tuple[float, ...]

    def quality(self, u: float) -> float:
        place = bisect_right(self.costs_s, u)
        return self.nets[place] + self.prices[place] * u

    def price(self, seconds_per_row: float) -> tuple[float, float]:
        """Of a second; and what a row earns beyond the price of its seconds."""
        place = bisect_right(self.costs_s, seconds_per_row)
        return self.prices[place], self.nets[place]


@dataclass(frozen=True, slots=True)
class Prices:
    """Hulls by the longest time that a batch may take, in the profile's seconds."""

    longest_s: tuple[float, ...]
    hulls: tuple[Hull, ...]

    @classmethod
    def of(
        cls,
        frontier: Sequence[int],
        quality: Mapping[int, float],
        profiled: Mapping[int, tuple[float, ...]],
    ) -> Prices:
        """`profiled` as in `LatencyView`."""
        low = profiled[frontier[0]][1]
        ratio = max(profiled[stitch][-1] for stitch in frontier) / low
        longest = tuple(low * ratio ** (i / (SPELLS - 1)) for i in range(SPELLS))
        hulls = tuple(_hull(frontier, quality, profiled, spell) for spell in longest)
        return cls(longest, hulls)

    def hull(self, longest_s: float) -> Hull:
        """For batches that take no longer than this."""
        return self.hulls[max(0, bisect_right(self.longest_s, longest_s) - 1)]


def _hull(
    frontier: Sequence[int],
    quality: Mapping[int, float],
    profiled: Mapping[int, tuple[float, ...]],
    longest_s: float,
) -> Hull:
    points = []
    for stitch in frontier:
        seconds = profiled[stitch]
        fits = max(1, bisect_right(seconds, longest_s, lo=1) - 1)
        points.append((min(seconds[n] / n for n in range(1, fits + 1)), quality[stitch]))
    points.sort(key=lambda point: (point[0], -point[1]))
    upper = [points[0]]
    for cost, worth in points[1:]:
        if worth <= upper[-1][1]:
            continue
        while len(upper) > 1 and _slope(upper[-2], upper[-1]) <= _slope(upper[-1], (cost, worth)):
            upper.pop()
        upper.append((cost, worth))
    slopes = [_slope(a, b) for a, b in zip(upper[:-1], upper[1:], strict=True)]
    cheapest_s, worth = upper[0]
    prices = (worth / cheapest_s, *slopes, 0.0)
    nets = [worth - price * cost for price, (cost, worth) in zip(prices[1:], upper, strict=True)]
    return Hull(tuple(cost for cost, _ in upper), prices, (0.0, *nets))


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])

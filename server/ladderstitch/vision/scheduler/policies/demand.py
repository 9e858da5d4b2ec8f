"""The demand that is due over time, forecast arrivals included, and the quality that it can earn.

Demand counts images, and takes every waiting request to have as many as recent ones had on average.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from ladderstitch.scheduling.requests import Request
from ladderstitch.vision.scheduler.policies.forecast import BUDGET_CAP_S, ArrivalForecast

FORECAST_HORIZON = 2.0
"""How far ahead arrivals are forecast, in mean budgets."""
DEADLINE_MARGIN = 0.25
"""Share of the tight budget that is kept in reserve, because batches are not a fluid."""
TIGHT_BUDGET_QUANTILE = 0.05
"""Share of requests whose budgets are below the tight budget, around which batches are planned."""
MIN_BUDGET_S = 1e-6
"""Shortest tight budget."""
CAPACITY_SCENARIOS = ((0.7, 0.02), (0.8, 0.05), (0.9, 0.23), (1.0, 0.4), (1.1, 0.3))
"""Actual over expected capacity when requests arrive in bursts, each with its probability."""
NUM_HULLS = 24
"""Number of longest batch durations for which a hull is computed."""

Point = tuple[float, float]
"""Seconds per image, quality."""


@dataclass(slots=True)
class Demand:
    """A demand bound function: the number of images that are due by a time from now.

    It is reduced to the points that can bind, which are those of its lower hull. Nothing changes
    it, but it is not frozen, because creating a frozen one takes three times as long.
    """

    points: tuple[tuple[float, float], ...]
    """Pairs of seconds from now and images due by then, both ascending."""
    tight_budget_s: float
    """Budget at the quantile `TIGHT_BUDGET_QUANTILE`."""
    min_s_per_image: float
    """Least seconds per waiting image, over the third sample of the queue and the later ones."""

    @classmethod
    def from_queue(
        cls,
        queue: Sequence[Request],
        first: int,
        forecast: ArrivalForecast,
        start: float,
    ) -> Demand:
        """Build the bound of queue[first:] plus forecast arrivals, sampled at powers of four."""
        waiting, images = len(queue) - first, forecast.images_per_request
        last_s = min(queue[-1].deadlines.soft - start, BUDGET_CAP_S)
        mean_s = forecast.mean_budget_s or last_s
        tight_s = max(MIN_BUDGET_S, forecast.budget_quantile_s(TIGHT_BUDGET_QUANTILE) or mean_s)
        samples: list[tuple[float, float]] = []
        count = 1
        while count < waiting:
            due_s = queue[first + count - 1].deadlines.soft - start
            samples.append((due_s if due_s < BUDGET_CAP_S else BUDGET_CAP_S, images * count))
            count *= 4
        samples.append((last_s, images * waiting))
        margin_s = DEADLINE_MARGIN * tight_s
        min_s = min([(due_s - margin_s) / n for due_s, n in samples[2:] or samples[-1:]])
        if last_s < FORECAST_HORIZON * mean_s:
            samples.append((FORECAST_HORIZON * mean_s, images * waiting))
        return cls(_lower_hull(forecast.add_arrivals(samples), margin_s), tight_s, min_s)


@dataclass(slots=True)
class Capacity:
    """How much of the engine's time is compute, as every batch has an overhead in addition.

    Nothing changes it, but it is not frozen, as `Demand` is not.
    """

    scale: float
    """Factor from seconds to the hull's profiled seconds."""
    share: float
    """Largest share of compute in the engine's time: that of the longest batch."""
    overhead_s: float
    """Least overhead per image: that of the largest batch."""

    def engine_s(self, profiled_s: float) -> float:
        """Return the engine's seconds for one image of this compute."""
        compute_s = profiled_s / self.scale
        return max(compute_s / self.share, compute_s + self.overhead_s)


class RemainingQuality:
    """The quality that all images but the first ones can earn once the engine is free again.

    The engine then serves a fluid in order of deadlines. The seconds per image are the slopes of
    the greatest convex minorant of the demand, from the end of the batch on. That minorant begins
    with a line to one of the demand's points, and what follows a point is always the same. So that
    part is computed once for each point.
    """

    __slots__ = ("_hull", "_overhead_s", "_points", "_rest", "_scale", "_share")

    def __init__(self, demand: Demand, hull: QualityHull, capacity: Capacity) -> None:
        self._points, self._hull = demand.points, hull
        self._scale, self._share = capacity.scale, capacity.share
        self._overhead_s = capacity.overhead_s
        self._rest = [0.0] * len(demand.points)
        for place in range(len(demand.points) - 2, -1, -1):
            due_s, count = demand.points[place]
            self._rest[place] = self.after(due_s, count, place + 1)

    def after(self, busy_s: float, done: float, place: int = 0) -> float:
        """Return the quality of all images but the first `done` after `busy_s` seconds.

        `place` is the first of the demand's points that counts.
        """
        points, num_points = self._points, len(self._points)
        while place < num_points:
            least_s, best = inf, -1
            for i in range(place, num_points):
                due_s, count = points[i]
                if count > done:
                    slope_s = (due_s - busy_s) / (count - done)
                    if slope_s < least_s:
                        least_s, best = slope_s, i
            if best < 0:
                break
            count = points[best][1]
            if least_s > 0:
                # The compute, of the engine's seconds for one image; negative if these do not
                # suffice for the overhead. Calls would add a third to the time of this method.
                shared_s, left_s = least_s * self._share, least_s - self._overhead_s
                compute_s = (shared_s if shared_s < left_s else left_s) * self._scale
                if compute_s <= 0:
                    return self._rest[best]
                hull = self._hull
                segment = bisect_right(hull.costs_s, compute_s)
                quality = hull.bases[segment] + hull.slopes[segment] * compute_s
                return (count - done) * quality + self._rest[best]
            done, place = count, best + 1  # no time is left for these
        return 0.0


def _lower_hull(
    points: Sequence[tuple[float, float]], margin_s: float
) -> tuple[tuple[float, float], ...]:
    """Return the points (seconds, images) between which no other has less time for its images.

    Both coordinates are ascending. The points that are returned are `margin_s` earlier.
    """
    hull: list[tuple[float, float]] = []
    for due_s, count in points:
        due_s -= margin_s
        while len(hull) > 1:
            first_s, first = hull[-2]
            middle_s, middle = hull[-1]
            if (middle_s - first_s) * (count - first) < (due_s - first_s) * (middle - first):
                break
            hull.pop()
        hull.append((due_s, count))
    return tuple(hull)


@dataclass(frozen=True, slots=True)
class QualityHull:
    """A concave, piecewise linear function from seconds per image to quality.

    Between `costs_s[i-1]` and `costs_s[i]`, u seconds per image earn `bases[i] + slopes[i] * u`.
    """

    costs_s: tuple[float, ...]
    bases: tuple[float, ...]
    slopes: tuple[float, ...]

    def quality(self, seconds_per_image: float) -> float:
        """Return the mean quality that `seconds_per_image` allow."""
        place = bisect_right(self.costs_s, seconds_per_image)
        return self.bases[place] + self.slopes[place] * seconds_per_image

    def smoothed(self) -> QualityHull:
        """Return the mean of this hull over `CAPACITY_SCENARIOS`, which is concave, too."""
        breaks = sorted({cost / share for cost in self.costs_s for share, _ in CAPACITY_SCENARIOS})
        return QualityHull.from_points(
            [
                (u, sum(w * self.quality(share * u) for share, w in CAPACITY_SCENARIOS))
                for u in breaks
            ]
        )

    @classmethod
    def from_points(cls, upper: Sequence[Point]) -> QualityHull:
        """Return the function through the points of a concave hull, cheapest point first."""
        slopes = [0.0, *(_slope(a, b) for a, b in pairwise(upper)), 0.0]
        slopes[0] = upper[0][1] / upper[0][0]
        bases = [0.0, *(q - m * c for (c, q), m in zip(upper, slopes[1:], strict=True))]
        return cls(tuple(cost for cost, _ in upper), tuple(bases), tuple(slopes))


@dataclass(frozen=True, slots=True)
class QualityHulls:
    """Hulls by the longest duration of a batch, in the profile's seconds."""

    longest_s: tuple[float, ...]
    hulls: tuple[QualityHull, ...]
    efficient: frozenset[int]
    """Variants on at least one hull; the others are never worth their time."""

    @classmethod
    def from_profile(
        cls,
        frontier: Sequence[int],
        quality: Mapping[int, float],
        profiled: Mapping[int, tuple[float, ...]],
    ) -> QualityHulls:
        """Return the hulls of a frontier; `profiled` is that of a `LatencyView`."""
        low = profiled[frontier[0]][1]
        ratio = max(profiled[variant][-1] for variant in frontier) / low
        longest = tuple(low * ratio ** (i / (NUM_HULLS - 1)) for i in range(NUM_HULLS))
        hulls: list[QualityHull] = []
        efficient: set[int] = set()
        for longest_s in longest:
            points = {
                (_min_seconds_per_image(profiled[variant], longest_s), quality[variant]): variant
                for variant in frontier
            }
            upper = _upper_hull(sorted(points, key=lambda point: (point[0], -point[1])))
            hulls.append(QualityHull.from_points(upper).smoothed())
            efficient.update(points[point] for point in upper)
        return cls(longest, tuple(hulls), frozenset(efficient))

    def for_longest(self, longest_s: float) -> QualityHull:
        """Return the hull for batches that take at most `longest_s` profiled seconds."""
        return self.hulls[max(0, bisect_right(self.longest_s, longest_s) - 1)]


def _min_seconds_per_image(seconds: Sequence[float], longest_s: float) -> float:
    """Return the least seconds per image in batches of at most `longest_s`, or of one image."""
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

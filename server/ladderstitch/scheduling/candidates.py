"""Which stitches a request may be answered by."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

from ladderstitch.scheduling.profiles import LatencyProfile, frontier
from ladderstitch.scheduling.requests import Request
from ladderstitch.scheduling.settings import SchedulerSettings


@dataclass(frozen=True, slots=True)
class Menu:
    """The frontier (fastest first, so quality rises along it), every stitch's quality, the rules.

    A request's own `stitch` may be any of the family. The operator's pin holds for everyone whose
    `min_quality` it satisfies; the operator's floor, and then the stitch of the policy `fixed`,
    for everyone whom no pin holds.
    """

    frontier: tuple[int, ...]
    quality: Mapping[int, float]
    pinned: int | None = None
    fixed: int | None = None
    floor: float = 0.0

    @classmethod
    def of(
        cls, quality: Mapping[int, float], profile: LatencyProfile, settings: SchedulerSettings
    ) -> Menu:
        alone = {stitch: profile.alone_s(stitch) for stitch in profile.stitches}
        points = frontier(quality, alone)
        return cls(
            frontier=tuple(point.stitch for point in points),
            quality=quality,
            pinned=settings.pinned_stitch,
            fixed=settings.stitch if settings.policy == "fixed" else None,
            floor=settings.min_quality,
        )

    @property
    def best(self) -> int:
        """The stitch of highest quality."""
        return self.frontier[-1]

    def admits(self, request: Request, stitch: int) -> bool:
        """Whether a request may be answered by a stitch."""
        if request.stitch is not None:
            return stitch == request.stitch
        if self.pinned is not None and self.quality[self.pinned] >= request.min_quality:
            return stitch == self.pinned
        return self.quality[stitch] >= max(self.floor, request.min_quality)

    def candidates(self, request: Request) -> tuple[int, ...]:
        """Stitches to choose from for a request, fastest first; never empty."""
        if request.stitch is not None:
            return (request.stitch,)
        return self.choices(request.min_quality)

    def choices(self, min_quality: float = 0.0) -> tuple[int, ...]:
        """Candidates of a request that names no stitch.

        Where nothing reaches the floors (they may have been raised while the request waited), the
        best stitch is all there is.
        """
        if self.pinned is not None and self.quality[self.pinned] >= min_quality:
            return (self.pinned,)
        floor = max(self.floor, min_quality)
        if self.fixed is not None and self.quality[self.fixed] >= floor:
            return (self.fixed,)
        first = bisect_left(self.frontier, floor, key=self.quality.__getitem__)
        return self.frontier[min(first, len(self.frontier) - 1) :]

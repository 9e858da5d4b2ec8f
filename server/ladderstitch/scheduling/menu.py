"""Which stitches a request may be answered by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ladderstitch.core import Request
from ladderstitch.measurements import LatencyProfile, frontier
from ladderstitch.scheduling.settings import SchedulerSettings


@dataclass(frozen=True, slots=True)
class Menu:
    """The frontier (fastest first, so quality rises along it), every stitch's quality, the rules.

    A request's own `stitch` may be any of the family. The operator's pin holds for everyone whose
    `min_quality` it satisfies; the operator's floor holds for everyone.
    """

    frontier: tuple[int, ...]
    quality: Mapping[int, float]
    pinned: int | None = None
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
        """Stitches to choose from for a request, fastest first; never empty.

        Where nothing reaches the floors (they may have been raised while the request waited), the
        best stitch is all there is.
        """
        if request.stitch is not None:
            return (request.stitch,)
        if self.pinned is not None and self.quality[self.pinned] >= request.min_quality:
            return (self.pinned,)
        floor = max(self.floor, request.min_quality)
        for index, stitch in enumerate(self.frontier):
            if self.quality[stitch] >= floor:
                return self.frontier[index:]
        return (self.best,)

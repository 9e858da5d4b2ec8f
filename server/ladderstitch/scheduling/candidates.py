"""Which variants a request may be answered by."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

from ladderstitch.scheduling.profiles import LatencyProfile, frontier
from ladderstitch.scheduling.requests import Request
from ladderstitch.scheduling.settings import SchedulerSettings


@dataclass(frozen=True, slots=True)
class CandidateFilter:
    """The frontier (fastest first, so quality rises along it), every variant's quality, the rules.

    A request's own `variant` may be any of the family. The operator's pin holds for everyone whose
    `min_quality` it satisfies; the operator's floor, and then the variant of the policy `fixed`,
    for everyone whom no pin holds.
    """

    frontier: tuple[int, ...]
    quality: Mapping[int, float]
    pinned: int | None = None
    fixed: int | None = None
    floor: float = 0.0

    @classmethod
    def from_settings(
        cls, quality: Mapping[int, float], profile: LatencyProfile, settings: SchedulerSettings
    ) -> CandidateFilter:
        alone = {variant: profile.alone_s(variant) for variant in profile.variants}
        points = frontier(quality, alone)
        return cls(
            frontier=tuple(point.variant for point in points),
            quality=quality,
            pinned=settings.pinned_variant,
            fixed=settings.fixed_variant if settings.policy == "fixed" else None,
            floor=settings.min_quality,
        )

    @property
    def best(self) -> int:
        """The variant of highest quality."""
        return self.frontier[-1]

    def admits(self, request: Request, variant: int) -> bool:
        """Whether a request may be answered by a variant."""
        if request.variant is not None:
            return variant == request.variant
        if self.pinned is not None and self.quality[self.pinned] >= request.min_quality:
            return variant == self.pinned
        return self.quality[variant] >= max(self.floor, request.min_quality)

    def for_request(self, request: Request) -> tuple[int, ...]:
        """Variants to choose from for a request, fastest first; never empty."""
        if request.variant is not None:
            return (request.variant,)
        return self.for_quality(request.min_quality)

    def for_quality(self, min_quality: float = 0.0) -> tuple[int, ...]:
        """Candidates of a request that names no variant.

        Where nothing reaches the floors (they may have been raised while the request waited), the
        best variant is all there is.
        """
        if self.pinned is not None and self.quality[self.pinned] >= min_quality:
            return (self.pinned,)
        floor = max(self.floor, min_quality)
        if self.fixed is not None and self.quality[self.fixed] >= floor:
            return (self.fixed,)
        first = bisect_left(self.frontier, floor, key=self.quality.__getitem__)
        return self.frontier[min(first, len(self.frontier) - 1) :]

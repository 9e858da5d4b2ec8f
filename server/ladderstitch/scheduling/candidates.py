"""The rules that say which variants may answer a request."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ladderstitch.scheduling.profiles import LatencyProfile, frontier
from ladderstitch.scheduling.requests import Request
from ladderstitch.scheduling.settings import SchedulerSettings


@dataclass(frozen=True, slots=True)
class CandidateFilter:
    """The variants of a model and the operator's rules for choosing among them.

    A request that names a variant gets that variant, which may be off the frontier. The operator's
    pin applies to every other request whose `min_quality` it satisfies. The operator's floor, and
    then the variant of the policy `fixed`, apply to the requests that the pin does not cover.
    """

    frontier: tuple[int, ...]
    """Variant ids on the frontier, fastest first; quality rises along it."""
    quality: Mapping[int, float]
    """Quality of every variant, 0 to 1, by variant id."""
    pinned: int | None = None
    fixed: int | None = None
    floor: float = 0.0
    _rising: tuple[float, ...] = field(init=False, repr=False, compare=False)
    """Quality of each variant on the frontier."""
    _suffixes: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)
    """The frontier from each of its variants on."""

    def __post_init__(self) -> None:
        variants = self.frontier
        object.__setattr__(self, "_rising", tuple(self.quality[variant] for variant in variants))
        object.__setattr__(self, "_suffixes", tuple(variants[i:] for i in range(len(variants))))

    @classmethod
    def from_settings(
        cls,
        quality: Mapping[int, float],
        profile: LatencyProfile,
        settings: SchedulerSettings,
        by_name: Collection[int] = (),
    ) -> CandidateFilter:
        """Return the filter for the frontier of `quality` over the latency at batch size 1.

        Variants in `by_name` are not on it: only requests that name one get it.
        """
        chosen = {variant: q for variant, q in quality.items() if variant not in by_name}
        alone = {variant: profile.alone_s(variant) for variant in profile.variants}
        points = frontier(chosen, alone)
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

    def allows(self, request: Request, variant: int) -> bool:
        """Return whether `variant` may answer `request`."""
        if request.variant is not None:
            return variant == request.variant
        if self.pinned is not None and self.quality[self.pinned] >= request.min_quality:
            return variant == self.pinned
        return self.quality[variant] >= max(self.floor, request.min_quality)

    def free_quality(self, variant: int) -> float:
        """Return the highest `min_quality` of requests, naming no variant, that it may answer.

        The result is negative if it answers none of them, or if that depends on more than their
        `min_quality`, for which `allows` exists.
        """
        quality = self.quality[variant]
        return -1.0 if self.pinned is not None or quality < self.floor else quality

    def for_request(self, request: Request) -> tuple[int, ...]:
        """Return the variants that may answer `request`, fastest first; at least one."""
        if request.variant is not None:
            return (request.variant,)
        return self.for_quality(request.min_quality)

    def for_quality(self, min_quality: float = 0.0) -> tuple[int, ...]:
        """Return the variants for a request that names no variant, fastest first; at least one.

        If no variant reaches the floors, the result is the best variant alone. This happens when
        the operator raises the floor while the request waits.
        """
        if self.pinned is not None and self.quality[self.pinned] >= min_quality:
            return (self.pinned,)
        floor = max(self.floor, min_quality)
        if self.fixed is not None and self.quality[self.fixed] >= floor:
            return (self.fixed,)
        first = bisect_left(self._rising, floor)
        return self._suffixes[min(first, len(self._suffixes) - 1)]

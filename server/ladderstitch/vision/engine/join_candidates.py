"""The variants that an engine joins: those on the frontier, and those near it."""

from __future__ import annotations

from ladderstitch.scheduling.profiles import LatencyProfile, QualityTable, frontier

SLACK = 0.15
"""Share of its time by which a stitch may be slower than the frontier and still be joined."""


def find_candidates(quality: QualityTable, profile: LatencyProfile) -> list[int]:
    """Return the stitches on the frontier, then those less than `SLACK` from it, fastest first.

    What joining saves differs between stitches, and a few runs are not exact.
    """
    seconds = {stitch: profile.alone_s(stitch) for stitch in profile.variants}
    points = find_frontier(quality, profile)

    def is_near(stitch: int) -> bool:
        return not any(
            quality.value(other) >= quality.value(stitch)
            and seconds[other] < (1 - SLACK) * seconds[stitch]
            for other in points
        )

    near = sorted(filter(is_near, seconds.keys() - points), key=seconds.__getitem__)
    return [*points, *near]


def find_frontier(quality: QualityTable, profile: LatencyProfile) -> list[int]:
    """Return the stitches on the frontier of quality and batch-1 latency, fastest first."""
    qualities = {stitch: score.value for stitch, score in quality.variants.items()}
    latencies = {stitch: profile.alone_s(stitch) for stitch in profile.variants}
    return [point.variant for point in frontier(qualities, latencies)]

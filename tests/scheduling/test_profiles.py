"""Tests of the frontier against its definition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ladderstitch.scheduling.profiles import frontier

coarse = st.integers(0, 6).map(lambda n: n / 6)


@given(st.lists(st.tuples(coarse, coarse), min_size=1, max_size=12))
def test_frontier_has_exactly_the_undominated_points(points: list[tuple[float, float]]) -> None:
    quality = {i: q for i, (q, _) in enumerate(points)}
    latency = {i: s for i, (_, s) in enumerate(points)}
    got = frontier(quality, latency)
    for point in got:
        assert not any(
            q >= point.quality
            and s <= point.latency_s
            and (q, s) != (point.quality, point.latency_s)
            for q, s in points
        )
    for q, s in points:
        assert any(p.quality >= q and p.latency_s <= s for p in got)
    assert [p.latency_s for p in got] == sorted({p.latency_s for p in got})

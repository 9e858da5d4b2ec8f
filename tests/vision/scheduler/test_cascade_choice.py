"""The choice of a cascade, compared with the plain rule that tries every cascade in turn."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.cascades import Cascade, CascadeSet, fill_share
from ladderstitch.scheduling.latency_model import LatencyView
from ladderstitch.scheduling.requests import Request
from ladderstitch.vision.scheduler.cascade_choice import CascadeChooser, count_needs
from ladderstitch.vision.scheduler.policies.base import SLACK_SCAN_LIMIT, Decision
from tests.support.image_scheduling import (
    ALONE_MS,
    make_candidates,
    make_request,
    plain_view,
)

NOW = 50.0
CONFIDENCES = st.sampled_from((0.3, 0.5, 0.62, 0.9, 0.9995, 1.0))
FASTEST_FIRST = sorted(ALONE_MS, key=ALONE_MS.__getitem__)


def shares(least: int, most: int) -> st.SearchStrategy[tuple[float, ...]]:
    """Return twelve multiples of 0.05 in a range, in ascending order."""
    values = st.lists(st.integers(least, most), min_size=12, max_size=12)
    return values.map(lambda drawn: tuple(n / 20 for n in sorted(drawn)))


@st.composite
def cascades(draw: st.DrawFn) -> Cascade:
    """Return a cascade of two variants of the synthetic family that may be worth its time."""
    first = draw(st.integers(0, 3))
    return Cascade(
        first=FASTEST_FIRST[first],
        last=draw(st.sampled_from(FASTEST_FIRST[first + 1 :])),
        shared=draw(st.sampled_from((0.0, 0.25, 0.7))),
        go_on=draw(shares(0, 8)),
        sure_quality=draw(shares(16, 20)),
        unsure_quality=draw(shares(0, 20)),
        last_quality=draw(shares(14, 20)),
    )


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Return a request of one or two images."""
    return make_request(
        NOW + draw(st.floats(0.0, 0.08)),
        num_images=draw(st.integers(1, 2)),
        min_confidence=draw(CONFIDENCES),
        min_quality=draw(st.sampled_from((0.0, 0.0, 0.0, 0.72, 0.85))),
    )


def choose_by_trying_all(
    cascade_set: CascadeSet,
    candidates: CandidateFilter,
    decision: Decision,
    waiting: Sequence[Request],
    latency: LatencyView,
) -> Decision:
    """Return what the rule's definition chooses at `NOW`, with an overhead of 1 ms."""
    requests = tuple(r for r in decision.requests if r.min_confidence > 0)
    if decision.requests[0].min_confidence == 0:
        return decision
    needs, quality = count_needs(requests), candidates.quality
    num_images, replaced = sum(needs.values()), quality[decision.variant]
    floor = max(candidates.floor, *(r.min_quality for r in requests))
    planned_end = NOW + latency.dispatch_overhead_s + latency.seconds(decision.variant, num_images)
    ends = [r.deadlines.soft - 0.001 for r in requests]
    fastest_s = latency.seconds(candidates.frontier[0], 1)
    behind = [r.deadlines.soft - 0.001 - fastest_s for r in waiting[:SLACK_SCAN_LIMIT]]
    latest_end = min(ends + [end for end in behind if end >= planned_end])
    scarce = bool(waiting) or len(decision.requests) > 1
    found: list[tuple[tuple[float, float], Cascade]] = []
    for cascade in sorted(cascade_set.cascades, key=lambda c: -quality[c.last]):
        mean = total = 0.0
        for confidence, images in needs.items():
            mean += cascade.going_on(confidence) * images
            total += cascade.quality(confidence) * images
        first_s = latency.expected(cascade.first, num_images)
        count = max(1, round(mean))
        tail_s = (1 - cascade.shared) * latency.expected(cascade.last, count)
        expected_s = first_s + tail_s * mean / count
        count = min(num_images, math.ceil(fill_share(mean, mean / num_images)))
        tail_s = (1 - cascade.shared) * latency.seconds(cascade.last, max(1, count))
        planned_s = first_s * latency.tail + (tail_s if count else 0.0)
        if (
            quality[cascade.last] >= max(replaced, floor)
            and quality[cascade.first] >= floor
            and expected_s < latency.expected(decision.variant, num_images)
            and planned_s <= latest_end - (NOW + latency.dispatch_overhead_s)
            and (not scarce or total / num_images > replaced)
        ):
            rank = (total / num_images, 0.0) if scarce else (quality[cascade.last], -expected_s)
            found.append((rank, cascade))
    if not found:
        return decision
    best = max(found, key=lambda pair: pair[0])[1]  # of equal ones the first
    return Decision(requests, best.last, best, latest_end)


@given(
    st.lists(cascades(), min_size=1, max_size=10),
    st.lists(requests(), min_size=1, max_size=4),
    st.lists(requests(), max_size=4),
    st.sampled_from((1, 2)),
    st.sampled_from((0.0, 0.74)),
    st.sampled_from(((1.0, 1.0, 0.0), (1.3, 2.0, 0.0005))),
)
def test_choice_is_what_trying_all_cascades_gives(
    made: list[Cascade],
    batch: list[Request],
    waiting: list[Request],
    variant: int,
    floor: float,
    machine: tuple[float, float, float],
) -> None:
    tail, slowdown, dispatch_s = machine
    plain = plain_view()
    view = LatencyView(plain.profiled, 8, slowdown, tail, dispatch_overhead_s=dispatch_s)
    candidates, cascade_set = make_candidates(min_quality=floor), CascadeSet({}, tuple(made))
    chooser, decision = (
        CascadeChooser(cascade_set, candidates, 0.001),
        Decision(tuple(batch), variant),
    )
    expected = choose_by_trying_all(cascade_set, candidates, decision, waiting, view)
    assert chooser.choose(decision, waiting, view, NOW) == expected
    for request in batch:
        chooser.prepare(request)
    assert chooser.choose(decision, waiting, view, NOW) == expected

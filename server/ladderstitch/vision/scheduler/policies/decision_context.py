"""What all choices of one decision of the adaptive policy share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ladderstitch.vision.scheduler.policies.demand import RemainingQuality
from ladderstitch.vision.scheduler.policies.forecast import ArrivalForecast


@dataclass(slots=True)
class DecisionContext:
    """The quantities that all choices of one decision share; nothing changes them.

    It is not frozen, because creating a frozen one takes three times as long.
    """

    start: float
    """Instant at which the batch starts."""
    num_late: int
    """Requests at the head of the queue that miss their soft deadline on every variant."""
    forecast: ArrivalForecast
    shortest_s: float
    """Shortest budget of recent requests."""
    remaining: RemainingQuality
    """Quality that the requests outside the batch can earn after it."""
    images: float
    """Images of a request, on average."""
    planned_scale: float
    """Factor from profiled seconds to planned seconds."""
    certain_scale: float
    """Factor from profiled seconds to those that no recent batch exceeded."""
    sharing_rate: float
    """Arrivals in 1/s of which a tight one has to run with the others."""
    fastest_s: Sequence[float]
    """Profiled seconds of the fastest variant by batch size; index 0 is unused."""
    one_s: float
    """Planned seconds of the fastest variant for one request."""
    two_s: float
    """Planned seconds of the fastest variant for two requests."""
    overloaded: bool
    """Whether not all waiting requests can be on time, in the fluid limit."""

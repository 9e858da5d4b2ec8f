"""The queue of waiting image requests, in deadline order."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from ladderstitch.scheduling.requests import Request

NORMAL_PRIORITY = 128
LOWEST_PRIORITY = 255
NO_DEADLINE_HORIZON_S = 1.0
"""Seconds after its arrival at which a request without a deadline is ordered."""


class OrderedRequests:
    """Requests in ascending order of a key; those with equal keys stay in the order of `add`.

    Reading, of which a decision does much, is that of a list. Adding or removing moves memory and
    takes less than 2 us at 1,000 requests, and less than 5 us at 10,000.
    """

    def __init__(self) -> None:
        self.keys = array("d")
        """The keys, ascending; an array, because bisecting a list reads objects all over memory."""
        self.requests: list[Request] = []
        """The requests in the order of their keys; change it only by `add` and `remove`."""

    def add(self, key: float, request: Request) -> None:
        """Add a request at its place in the order."""
        place = bisect_right(self.keys, key)
        self.keys.insert(place, key)
        self.requests[place:place] = (request,)  # `insert` takes twice as long

    def remove(self, key: float, request: Request) -> None:
        """Remove a request that was added with this key. Raises `ValueError` if there is none."""
        place = self.requests.index(request, bisect_left(self.keys, key))
        del self.keys[place], self.requests[place]


class DeadlineQueue:
    """The waiting requests, sorted by soft deadline plus a shift by priority.

    The shift is at most `priority_window_s` seconds in either direction. It bounds ageing, too: a
    request of higher priority overtakes only requests that arrived at most two windows earlier.
    Requests with equal keys stay in order of arrival.
    """

    def __init__(self, priority_window_s: float) -> None:
        self.priority_window_s = priority_window_s
        self.num_images = 0
        """Images of all waiting requests."""
        self._by_urgency = OrderedRequests()
        self._by_hard_deadline = OrderedRequests()

    def key(self, request: Request) -> float:
        """Return the instant by which a request is ordered."""
        deadline = request.deadlines.soft
        if deadline == float("inf"):
            deadline = request.arrival + NO_DEADLINE_HORIZON_S
        level = request.priority or NORMAL_PRIORITY
        shift = (level - NORMAL_PRIORITY) / (LOWEST_PRIORITY - NORMAL_PRIORITY)
        return deadline + shift * self.priority_window_s

    def __len__(self) -> int:
        return len(self._by_urgency.requests)

    @property
    def view(self) -> Sequence[Request]:
        """The requests, most urgent first; the sequence is live and changes with the queue."""
        return self._by_urgency.requests

    def images_before(self, request: Request) -> float:
        """Return the estimated number of images that would run before a request added now."""
        return self.images_due(self.key(request))

    def images_due(self, key: float) -> float:
        """Return the estimated number of images of the requests whose key is below `key`."""
        keys = self._by_urgency.keys
        return self.num_images * bisect_left(keys, key) / len(keys) if keys else 0.0

    def add(self, request: Request) -> None:
        """Add a request at its place in the order."""
        self._by_urgency.add(self.key(request), request)
        if request.deadlines.hard != float("inf"):
            self._by_hard_deadline.add(request.deadlines.hard, request)
        self.num_images += request.num_images

    def remove(self, request: Request) -> None:
        """Remove a request. Raises `ValueError` if it is not in the queue."""
        self._by_urgency.remove(self.key(request), request)
        if request.deadlines.hard != float("inf"):
            self._by_hard_deadline.remove(request.deadlines.hard, request)
        self.num_images -= request.num_images

    def remove_expired(self, now: float) -> list[Request]:
        """Remove and return the requests whose hard deadline is `now` or earlier."""
        by_hard = self._by_hard_deadline
        expired = by_hard.requests[: bisect_right(by_hard.keys, now)]
        for request in expired:
            self.remove(request)
        return expired

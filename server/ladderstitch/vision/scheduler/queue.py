"""The queue of waiting image requests, in deadline order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from sortedcontainers import SortedKeyList

from ladderstitch.scheduling.requests import Request

NORMAL_PRIORITY = 128
LOWEST_PRIORITY = 255
NO_DEADLINE_HORIZON_S = 1.0
"""Seconds after its arrival at which a request without a deadline is ordered."""


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
        self._ordered: SortedKeyList = SortedKeyList(key=self.key)
        self._by_hard_deadline: SortedKeyList = SortedKeyList(
            key=lambda request: request.deadlines.hard
        )

    def key(self, request: Request) -> float:
        """Return the instant by which a request is ordered."""
        deadline = request.deadlines.soft
        if deadline == float("inf"):
            deadline = request.arrival + NO_DEADLINE_HORIZON_S
        level = request.priority or NORMAL_PRIORITY
        shift = (level - NORMAL_PRIORITY) / (LOWEST_PRIORITY - NORMAL_PRIORITY)
        return deadline + shift * self.priority_window_s

    def __len__(self) -> int:
        return len(self._ordered)

    @property
    def view(self) -> Sequence[Request]:
        """The requests, most urgent first; the sequence is live and changes with the queue."""
        return cast("Sequence[Request]", self._ordered)

    def images_before(self, request: Request) -> float:
        """Return the estimated number of images that would run before a request added now."""
        return self.images_due(self.key(request))

    def images_due(self, key: float) -> float:
        """Return the estimated number of images of the requests whose key is below `key`."""
        if not self._ordered:
            return 0.0
        ahead: int = self._ordered.bisect_key_left(key)
        return self.num_images * ahead / len(self._ordered)

    def add(self, request: Request) -> None:
        """Add a request at its place in the order."""
        self._ordered.add(request)
        if request.deadlines.hard != float("inf"):
            self._by_hard_deadline.add(request)
        self.num_images += request.num_images

    def remove(self, request: Request) -> None:
        """Remove a request. Raises `ValueError` if it is not in the queue."""
        self._ordered.remove(request)
        self._by_hard_deadline.discard(request)
        self.num_images -= request.num_images

    def remove_expired(self, now: float) -> list[Request]:
        """Remove and return the requests whose hard deadline is `now` or earlier."""
        expired = list(self._by_hard_deadline.irange_key(max_key=now))
        for request in expired:
            self.remove(request)
        return expired

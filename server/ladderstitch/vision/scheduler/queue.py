"""Requests that wait, in deadline order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from sortedcontainers import SortedKeyList

from ladderstitch.scheduling.requests import Request

NORMAL_PRIORITY = 128
LOWEST_PRIORITY = 255
NO_DEADLINE_HORIZON_S = 1.0
"""A request without a deadline takes its turn as if it were due this long after its arrival."""


class DeadlineQueue:
    """Kept sorted by target, which a priority shifts by at most `priority_window_s` either way.

    The shift is the ageing too: a request of higher priority overtakes only what arrived at most
    that much (times two) earlier. Equal keys stay in order of arrival.
    """

    def __init__(self, priority_window_s: float) -> None:
        self.priority_window_s = priority_window_s
        self._ordered: SortedKeyList = SortedKeyList(key=self.key)
        self._by_limit: SortedKeyList = SortedKeyList(key=lambda request: request.deadlines.hard)
        self.num_images = 0

    def key(self, request: Request) -> float:
        target = request.deadlines.soft
        if target == float("inf"):
            target = request.arrival + NO_DEADLINE_HORIZON_S
        level = request.priority or NORMAL_PRIORITY
        shift = (level - NORMAL_PRIORITY) / (LOWEST_PRIORITY - NORMAL_PRIORITY)
        return target + shift * self.priority_window_s

    def __len__(self) -> int:
        return len(self._ordered)

    @property
    def view(self) -> Sequence[Request]:
        """The requests, most urgent first; live, not to be kept across a change."""
        return cast("Sequence[Request]", self._ordered)

    def images_before(self, request: Request) -> float:
        """Estimated rows that would run before this request, if it were added now."""
        return self.images_due(self.key(request))

    def images_due(self, key: float) -> float:
        """Estimated rows of requests whose key is below this one."""
        if not self._ordered:
            return 0.0
        ahead: int = self._ordered.bisect_key_left(key)
        return self.num_images * ahead / len(self._ordered)

    def add(self, request: Request) -> None:
        self._ordered.add(request)
        if request.deadlines.hard != float("inf"):
            self._by_limit.add(request)
        self.num_images += request.num_images

    def remove(self, request: Request) -> None:
        """Raises `ValueError` if the request does not wait here."""
        self._ordered.remove(request)
        self._by_limit.discard(request)
        self.num_images -= request.num_images

    def take_expired(self, now: float) -> list[Request]:
        """Remove and return the requests whose limit has passed."""
        expired = list(self._by_limit.irange_key(max_key=now))
        for request in expired:
            self.remove(request)
        return expired

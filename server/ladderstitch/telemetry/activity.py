"""What one model has done in the last minutes: its last answers, its budgets, quality and queue.

Prometheus keeps such figures over days. This record is for people who look at one server now, and
costs a few microseconds a request. It is kept only where a page shows it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ladderstitch.scheduling.generation import TokenSpan

BUCKET_S = 5
"""Seconds that one bucket of the record covers."""
NUM_BUCKETS = 60
"""Buckets that are kept: those of the last five minutes."""
MAX_ANSWERS = 200
"""Answers that are kept one by one."""


@dataclass(slots=True)
class Bucket:
    """The counts of `BUCKET_S` seconds; `number` is the clock's time over `BUCKET_S`."""

    number: int
    answered: int = 0
    rejected: int = 0
    met: int = 0
    missed: int = 0
    """Budgets that were not met, by late answers or by none."""
    quality_sum: float = 0.0
    quality_count: int = 0
    longest_queue: int = 0

    @property
    def attainment(self) -> float | None:
        """The share of budgets that were met, 0 to 1; None without a budget."""
        total = self.met + self.missed
        return self.met / total if total else None

    @property
    def quality(self) -> float | None:
        """The mean quality of the answers, 0 to 1; None without an answer of known quality."""
        return self.quality_sum / self.quality_count if self.quality_count else None


@dataclass(slots=True)
class RecentAnswer:
    """One answer: its variant and quality, its seconds, and whether its budgets were met.

    `seconds` count from the arrival. `token_s` is the mean time between the tokens of a text, and
    `spans` are its tokens by path. `budget_s` is None without a budget, and for texts, which have
    several. `at` and `number` are set by `RecentActivity.add`.
    """

    variant: int
    quality: float | None
    seconds: float
    met: bool | None
    budget_s: float | None = None
    token_s: float | None = None
    spans: tuple[TokenSpan, ...] = ()
    at: float = 0.0
    number: int = 0


class RecentActivity:
    """The record of one model, in buckets of `BUCKET_S`; times are seconds of `clock`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.queue_length = 0
        self.answers: deque[RecentAnswer] = deque(maxlen=MAX_ANSWERS)
        """The last answers, oldest first; their numbers rise by one from 1."""
        self.num_answers = 0
        """The number of the last answer."""
        self._buckets: deque[Bucket] = deque([self._new_bucket()], maxlen=NUM_BUCKETS)

    def add(self, answer: RecentAnswer) -> None:
        """Record an answer that was just given."""
        self.num_answers += 1
        answer.at, answer.number = self.clock(), self.num_answers
        self.answers.append(answer)
        bucket = self._current()
        bucket.answered += 1
        if answer.quality is not None:
            bucket.quality_sum += answer.quality
            bucket.quality_count += 1
        if answer.met is not None:
            bucket.met += answer.met
            bucket.missed += not answer.met

    def add_rejection(self, *, is_missed: bool) -> None:
        """Record a request that ended without an answer, and whether it missed a budget."""
        bucket = self._current()
        bucket.rejected += 1
        bucket.missed += is_missed

    def set_queue_length(self, num_waiting: int) -> None:
        """Record the number of waiting requests."""
        self.queue_length = num_waiting
        if num_waiting:
            bucket = self._current()
            bucket.longest_queue = max(bucket.longest_queue, num_waiting)

    def buckets(self) -> list[Bucket]:
        """Return the last `NUM_BUCKETS` buckets, oldest first, with empty ones for idle times."""
        newest = self._current().number
        kept = {bucket.number: bucket for bucket in self._buckets}
        numbers = range(newest - NUM_BUCKETS + 1, newest + 1)
        return [kept.get(number) or Bucket(number) for number in numbers]

    def total(self) -> Bucket:
        """Return the sums over the last `NUM_BUCKETS` buckets, and their longest queue."""
        total = Bucket(self._current().number)
        for bucket in self.buckets():
            total.answered += bucket.answered
            total.rejected += bucket.rejected
            total.met += bucket.met
            total.missed += bucket.missed
            total.quality_sum += bucket.quality_sum
            total.quality_count += bucket.quality_count
            total.longest_queue = max(total.longest_queue, bucket.longest_queue)
        return total

    def _current(self) -> Bucket:
        """Return the bucket of now; a new one starts with the queue that still waits."""
        newest = self._buckets[-1]
        if newest.number == int(self.clock() // BUCKET_S):
            return newest
        self._buckets.append(self._new_bucket())
        return self._buckets[-1]

    def _new_bucket(self) -> Bucket:
        return Bucket(int(self.clock() // BUCKET_S), longest_queue=self.queue_length)

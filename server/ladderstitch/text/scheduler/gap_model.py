"""The pauses between steps, learned online."""

from __future__ import annotations

FORGETTING = 0.98
"""Weight of an observation relative to that of the next one."""
PRIOR_WEIGHT = 0.1
"""Weight of the assumption that a pause is in proportion to the sequences."""
MAX_RATIO = 3.0
"""Longest pause over the expected one that is believed; longer ones are disturbances."""


class GapModel:
    """The seconds between two steps, in which tokens are delivered and the next step is planned.

    They are `base_s + sequence_s * n` for a step of n sequences: a line by weighted least squares,
    whose weights fall with age. Until steps of several sizes were observed, it goes through 0.
    """

    def __init__(self) -> None:
        self.base_s = self.sequence_s = 0.0
        self._weight, self._n, self._nn = PRIOR_WEIGHT, 0.0, 0.0
        self._seconds = self._n_seconds = 0.0

    def expected(self, num_sequences: int) -> float:
        """Return the expected seconds of the pause after a step of `num_sequences`."""
        return self.base_s + self.sequence_s * num_sequences

    def observe(self, num_sequences: int, seconds: float) -> None:
        """Learn the seconds between a step of `num_sequences` and the next one."""
        if expected := self.expected(num_sequences):
            seconds = min(seconds, MAX_RATIO * expected)
        n = num_sequences
        self._weight = FORGETTING * (self._weight - PRIOR_WEIGHT) + 1.0 + PRIOR_WEIGHT
        self._n = FORGETTING * self._n + n
        self._nn = FORGETTING * self._nn + n * n
        self._seconds = FORGETTING * self._seconds + seconds
        self._n_seconds = FORGETTING * self._n_seconds + n * seconds
        spread = self._weight * self._nn - self._n**2
        slope = (self._weight * self._n_seconds - self._n * self._seconds) / spread
        # A negative part of the line is not physical: the other part alone is fitted then.
        largest = self._n_seconds / self._nn
        self.sequence_s = min(max(0.0, slope), largest)
        self.base_s = max(0.0, (self._seconds - self.sequence_s * self._n) / self._weight)

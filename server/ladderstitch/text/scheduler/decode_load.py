"""The load that sequences in progress are for each other and for a new request."""

from __future__ import annotations

import math
from collections import abc
from dataclasses import dataclass, field

from ladderstitch.text.scheduler.sequence import Sequence
from ladderstitch.text.scheduler.step_times import StepTimes


@dataclass(frozen=True, slots=True)
class SchedulerLoad:
    """The sequences in progress, as the load that a new request meets."""

    token_periods_s: dict[int, list[float]] = field(default_factory=dict)
    """By variant, the seconds in which each of its sequences needs a token."""
    prefill_tokens: dict[int, int] = field(default_factory=dict)
    """Prompt tokens that are still to be computed, by variant."""
    num_waiting: int = 0
    num_cached: int = 0
    """Tokens of all sequences in the cache, which a round of tokens reads."""

    @classmethod
    def from_sequences(
        cls,
        active: abc.Collection[Sequence],
        waiting: abc.Collection[Sequence],
        times: StepTimes,
        now: float,
    ) -> SchedulerLoad:
        """Return the load of active and waiting sequences at the instant `now`."""
        periods: dict[int, list[float]] = {}
        prefill_tokens: dict[int, int] = {}
        num_cached, shortest_s = 0, times.shortest_token_s
        for sequence in (*active, *waiting):
            variant, num_pending = sequence.variant, sequence.num_pending
            num_cached += sequence.history.num_tokens
            periods.setdefault(variant, []).append(sequence.pace.period_s(now, shortest_s))
            if num_pending > 1:
                prefill_tokens[variant] = prefill_tokens.get(variant, 0) + num_pending
        return cls(periods, prefill_tokens, len(waiting), num_cached)


NO_LOAD = SchedulerLoad()
MAX_SHARE = 0.8
"""Share of the ranks' time up to which budgets are expected to be met.

The rest is for the prompts of requests to come, and for steps that take longer than expected.
"""


class DecodeLoad:
    """The share of the ranks' time that decoding needs.

    All sequences of a variant share its steps, which follow each other in the shortest period of
    these sequences; steps of several variants take turns by deadline. All budgets can be met if
    the shares of the variants add up to at most 1 (utilisation under earliest deadline first, Liu
    and Layland 1973).
    """

    def __init__(self, load: SchedulerLoad, times: StepTimes) -> None:
        self._periods_s = {v: list(periods) for v, periods in load.token_periods_s.items()}
        self._times = times
        count = sum(map(len, self._periods_s.values()))
        self._cached_s = times.cached_s(load.num_cached) / max(1, count)
        self._steps_s: dict[tuple[int, int], float] = {}
        self._shares = {v: self._share_of(v) for v in self._periods_s}
        self.share = sum(self._shares.values())
        """The share that all sequences need; above 1, some of them miss their budgets."""

    @property
    def round_s(self) -> float:
        """The expected seconds until every sequence has one more token."""
        return sum(self._step_s(v, len(periods)) for v, periods in self._periods_s.items())

    def share_with(self, variant: int, period_s: float) -> float:
        """Return the share with one more sequence."""
        periods = self._periods_s.get(variant, ())
        others = self.share - self._shares.get(variant, 0.0)
        step_s = self._step_s(variant, len(periods) + 1)
        return others + step_s / min(period_s, *periods, math.inf)

    def token_s_with(self, variant: int) -> float:
        """Return the expected seconds per token of one more sequence on a variant.

        It gets the time that the others leave, or one token in each round if they leave none.
        """
        others = self.share - self._shares.get(variant, 0.0)
        count = len(self._periods_s.get(variant, ()))
        step_s = self._step_s(variant, count + 1)
        round_s = self.round_s + step_s - self._step_s(variant, count)
        return min(round_s, step_s / (1.0 - others)) if others < 1.0 else round_s

    def add(self, variant: int, period_s: float) -> None:
        """Add a sequence on a variant."""
        self._periods_s.setdefault(variant, []).append(period_s)
        self._update(variant)

    def remove(self, variant: int, period_s: float) -> None:
        """Remove one of the sequences on a variant, of this period."""
        self._periods_s[variant].remove(period_s)
        self._update(variant)

    def _update(self, variant: int) -> None:
        self._shares[variant] = self._share_of(variant)
        self.share = sum(self._shares.values())

    def _share_of(self, variant: int) -> float:
        periods_s = self._periods_s[variant]
        return self._step_s(variant, len(periods_s)) / min(periods_s) if periods_s else 0.0

    def _step_s(self, variant: int, num_sequences: int) -> float:
        """Return the expected seconds of a step; they are computed once for each kind of step."""
        if not num_sequences:
            return 0.0
        key = (variant, num_sequences)
        if (step_s := self._steps_s.get(key)) is None:
            step_s = self._times.expected(variant, num_sequences, num_sequences)
            step_s += num_sequences * self._cached_s
            self._steps_s[key] = step_s
        return step_s


def first_token_s(variant: int, num_tokens: int, load: SchedulerLoad, times: StepTimes) -> float:
    """Return the expected seconds to the first token, with `num_tokens` of the prompt to compute.

    The prompts of all other sequences are computed before.
    """
    ahead_s = sum(times.prefill_s(other, n) for other, n in load.prefill_tokens.items())
    return ahead_s + times.prefill_s(variant, num_tokens)

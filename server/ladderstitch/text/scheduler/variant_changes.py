"""The change of an answer's variant between two of its tokens: pure, no clock, no I/O.

Variants that differ in the precision of their matrices only write interchangeable keys and values.
An answer among them may therefore go on with another one, and nothing is computed again.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.text.scheduler.planner import SchedulerLoad, decode_round_s
from ladderstitch.text.scheduler.sequence import Sequence
from ladderstitch.text.scheduler.step_times import StepTimes

MIN_LEAD = 1.15
"""Seconds that a token may take, over those expected of a better variant, before a change to it."""


@dataclass(frozen=True, slots=True)
class VariantChange:
    """A sequence, and the variant that computes its tokens from now on."""

    sequence: Sequence
    variant: int


@dataclass(frozen=True, slots=True)
class ChangeRules:
    """The variants that may follow each other, and what decides between them."""

    alternatives: abc.Sequence[frozenset[int]]
    """By variant: those that may follow it within an answer, itself included."""
    candidates: CandidateFilter
    settings: SchedulerSettings

    def plan(
        self, active: abc.Collection[Sequence], times: StepTimes, now: float
    ) -> list[VariantChange]:
        """Return the changes of decoding sequences before the next step, tightest budget first.

        A sequence leaves its variant if it would miss its budget, and changes to a better one if it
        would meet the budget with `MIN_LEAD`. A sequence of a request that names its variant keeps
        it. Without a budget, a sequence leaves a variant only if it may no longer be used.
        """
        movable = [s for s in active if self._may_change(s)]
        if not movable:
            return []
        affordable = {sequence: sequence.affordable_token_s(now) for sequence in movable}
        counts = dict(SchedulerLoad.from_sequences(active, ()).num_sequences)
        changes = []
        for sequence in sorted(movable, key=affordable.__getitem__):
            variant = self._choose(sequence, affordable[sequence], counts, times)
            if variant != sequence.variant:
                counts[sequence.variant] -= 1
                counts[variant] = counts.get(variant, 0) + 1
                changes.append(VariantChange(sequence, variant))
        return changes

    def _may_change(self, sequence: Sequence) -> bool:
        return (
            sequence.request.variant is None
            and sequence.num_pending == 1
            and sequence.first_token_at is not None
            and len(self.alternatives[sequence.variant]) > 1
        )

    def _choose(
        self, sequence: Sequence, affordable_s: float, counts: dict[int, int], times: StepTimes
    ) -> int:
        """Return the variant for the next tokens of a sequence; `counts` has all sequences."""
        allowed = self.candidates.for_quality(sequence.request.min_quality)
        variants = [v for v in allowed if v in self.alternatives[sequence.variant]]
        if not variants:
            return sequence.variant
        quality, current = self.candidates.quality, sequence.variant
        others = {} if self.settings.policy == "max_quality" else dict(counts)
        others[current] = max(0, others.get(current, 0) - 1)
        for variant in reversed(variants):
            expected_s = decode_round_s(others | {variant: others.get(variant, 0) + 1}, times)
            is_better = quality[variant] > quality[current]
            if expected_s * (MIN_LEAD if is_better else 1.0) <= affordable_s:
                return variant
        return variants[0]

"""The change of an answer's variant between two of its tokens: pure, no clock, no I/O.

Variants that differ in the precision of their matrices only write interchangeable keys and values.
An answer among them goes on with another one, and nothing is computed again. The variants of a
family read other planes of the cache, which are translated or computed again first
(`cache_rules.py`).
"""

from __future__ import annotations

import math
from collections import abc
from dataclasses import dataclass, replace

from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.text.scheduler.cache_rules import CacheRules
from ladderstitch.text.scheduler.decode_load import (
    MAX_SHARE,
    NO_LOAD,
    DecodeLoad,
    SchedulerLoad,
)
from ladderstitch.text.scheduler.pace import PACE_TOKENS
from ladderstitch.text.scheduler.sequence import Sequence
from ladderstitch.text.scheduler.step_times import StepTimes

MIN_LEAD = 1.15
"""The share that is free over the share that is needed before a change to a better variant."""
MIN_TOKENS_LEFT = 4
"""Tokens that an answer must still have for a change to a better variant of another kind."""


@dataclass(frozen=True, slots=True)
class VariantChange:
    """A sequence, and the variant that computes its tokens from now on."""

    sequence: Sequence
    variant: int


@dataclass(frozen=True, slots=True)
class ChangeRules:
    """The variants that may follow each other, and what decides between them."""

    cache_rules: CacheRules
    candidates: CandidateFilter
    settings: SchedulerSettings

    def plan(
        self, active: abc.Collection[Sequence], times: StepTimes, now: float
    ) -> list[VariantChange]:
        """Return the changes of decoding sequences before the next step, tightest budget first.

        A sequence leaves its variant if some budget would be missed otherwise, its own or that of
        another one, and changes to a better one if all budgets would be met with `MIN_LEAD`. A
        sequence of a request that names its variant keeps it. Without a budget, a sequence leaves a
        variant only if it may no longer be used.
        """
        if not self.settings.change_variants:
            return []
        movable = [s for s in active if self._may_change(s)]
        if not movable:
            return []
        shortest_s = times.shortest_token_s
        periods = {s: s.pace.period_s(now, shortest_s) for s in movable}
        shared = DecodeLoad(SchedulerLoad.from_sequences(active, (), times, now), times)
        changes = []
        for sequence in sorted(movable, key=periods.__getitem__):
            period_s = periods[sequence]
            shared.remove(sequence.variant, period_s)
            others = shared if self.settings.policy != "max_quality" else _alone(sequence, times)
            variant = self._choose(sequence, period_s, others, times)
            shared.add(variant, period_s)
            if variant != sequence.variant:
                changes.append(VariantChange(sequence, variant))
        return changes

    def _may_change(self, sequence: Sequence) -> bool:
        return (
            sequence.request.variant is None
            and sequence.num_pending == 1
            and sequence.pace.first_token_at is not None
            and len(self.cache_rules.alternatives[sequence.variant]) > 1
        )

    def _choose(
        self,
        sequence: Sequence,
        period_s: float,
        others: DecodeLoad,
        times: StepTimes,
    ) -> int:
        """Return the variant for the next tokens of a sequence, given the load of the others."""
        allowed = self.candidates.for_quality(sequence.request.min_quality)
        quality, current = self.candidates.quality, sequence.variant
        variants = [v for v in allowed if v in self.cache_rules.alternatives[current]]
        if not variants:
            return current
        has_budget = sequence.pace.has_token_budget
        for variant in reversed(variants):
            is_better = quality[variant] > quality[current]
            largest = MAX_SHARE / (MIN_LEAD if is_better else 1.0) if has_budget else math.inf
            share = others.share_with(variant, period_s)
            if share > largest or (is_better and not self._pays(sequence, variant)):
                continue
            if share + self._change_s(sequence, variant, times) / period_s <= largest:
                return variant
        return variants[0]

    def _pays(self, sequence: Sequence, variant: int) -> bool:
        """Return whether a change to a better variant is worth its cost in quality."""
        kinds = self.cache_rules.kinds
        if kinds[variant] == kinds[sequence.variant]:
            return True
        left = sequence.pace.num_left
        is_worthwhile = self.cache_rules.is_worthwhile(sequence.variant, variant)
        return left >= MIN_TOKENS_LEFT and is_worthwhile

    def _change_s(self, sequence: Sequence, variant: int, times: StepTimes) -> float:
        """Return the seconds of a change, spread over the tokens in which an answer catches up."""
        rules, mode = self.cache_rules, self.settings.cache_mode
        cached, kind = sequence.history.num_tokens, rules.kinds[variant]
        if kind == sequence.kind or mode == "write-through":
            return 0.0
        left = sequence.pace.num_left
        if mode == "recompute":
            seconds = times.prefill_s(variant, cached)
        elif mode == "catch-up":
            seconds = times.prefill_s(variant, cached - sequence.history.num_exact(kind))
        else:
            missing = cached - sequence.history.num_complete(kind)
            num_planes = rules.num_missing[sequence.variant][variant]
            seconds = times.translation_s(missing, num_planes)
        return seconds / max(1, min(left, PACE_TOKENS))


def _alone(sequence: Sequence, times: StepTimes) -> DecodeLoad:
    """Return the load of no other sequences, with the cache of this one."""
    return DecodeLoad(replace(NO_LOAD, num_cached=sequence.history.num_tokens), times)

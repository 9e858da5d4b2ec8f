"""What happens to cached keys and values when an answer changes its variant, and their repair."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ladderstitch.scheduling.settings import CacheMode
from ladderstitch.text.messages import SequenceInput, Translation
from ladderstitch.text.scheduler.cache_rules import CacheRules
from ladderstitch.text.scheduler.decode_load import MAX_SHARE, DecodeLoad
from ladderstitch.text.scheduler.queue import SequenceQueue
from ladderstitch.text.scheduler.sequence import Sequence
from ladderstitch.text.scheduler.step_times import StepTimes

REPAIR_TOKENS = 64
"""Most tokens whose keys and values a step in idle time computes again."""
REPAIR_MARGIN = 1.25
"""The share of the ranks' time that is free after such a step over the share that is needed.

It is larger than `MIN_LEAD`, so that a repair does not cause a change of the variant.
"""


@dataclass(frozen=True, slots=True)
class Repair:
    """Tokens of a sequence that its variant computes again, and the seconds that it takes."""

    sequence: Sequence
    tokens: SequenceInput
    planned_s: float


@dataclass(frozen=True, slots=True)
class CacheChanges:
    """The changes of variants of the sequences in a queue, as far as their caches are concerned."""

    rules: CacheRules
    queue: SequenceQueue

    def change(self, sequence: Sequence, variant: int, mode: CacheMode) -> None:
        """Move a sequence to a variant, and do with its cache what `mode` says.

        A sequence that is computed again may lose its blocks; it is then admitted again.
        """
        rules = self.rules
        if rules.kinds[sequence.variant] == rules.kinds[variant]:
            sequence.change_variant(variant, "shared")
        elif mode == "recompute":
            sequence.change_variant(variant, "recomputed")
            self.queue.restart(sequence)
        elif mode == "catch-up":
            self._catch_up(sequence, variant)
        elif not rules.num_missing[sequence.variant][variant]:
            sequence.change_variant(variant, "shared")
        else:
            is_whole = not sequence.history.missing(rules.kinds[variant])
            sequence.change_variant(variant, "written-through" if is_whole else "projected")

    def _catch_up(self, sequence: Sequence, variant: int) -> None:
        """Compute again what the variant did not compute; all of it if others share the blocks."""
        if not self.queue.block_manager.reclaim(sequence.block_table.blocks):
            sequence.change_variant(variant, "recomputed")
            self.queue.restart(sequence)
            return
        sequence.change_variant(variant, "caught-up")
        sequence.rewind(sequence.history.num_exact(sequence.kind))

    def next_repair(self, times: StepTimes, now: float) -> Repair | None:
        """Return the next repair that every sequence can afford to wait for; None: there is none.

        Blocks that several sequences hold are not repaired.
        """
        if len(set(self.rules.kinds)) == 1:
            return None
        num_tokens = min(REPAIR_TOKENS, times.max_step_tokens)
        for sequence in self.queue.active:
            tokens = sequence.next_repair(num_tokens)
            if tokens is None or sequence.num_pending != 1:
                continue
            seconds = times.expected(sequence.variant, len(tokens.tokens))
            if not self._can_wait(seconds, times, now):
                return None
            if self.queue.block_manager.reclaim(tokens.blocks):
                return Repair(sequence, tokens, seconds)
        return None

    def _can_wait(self, seconds: float, times: StepTimes, now: float) -> bool:
        """Return whether no sequence waits, and all budgets are met easily after such a pause."""
        if self.queue.waiting or any(s.num_pending != 1 for s in self.queue.active):
            return False
        load = DecodeLoad(self.queue.load(times, now + seconds), times)
        return load.share * REPAIR_MARGIN <= MAX_SHARE

    def translation_s(self, translations: Iterable[Translation], times: StepTimes) -> float:
        """Return the expected seconds of some translations."""
        return sum(
            times.translation_s(len(t.tokens), self.rules.num_missing[t.source][t.target])
            for t in translations
        )

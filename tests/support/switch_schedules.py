"""The switch schedules of answers: recorded in a busy scheduler, and run again alone.

A schedule has what decides on the keys and values of an answer: changes of its path, repairs in
idle time, and restarts from its first token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Events
from dataclasses import dataclass
from itertools import pairwise

from ladderstitch.scheduling.settings import CacheMode, SchedulerSettings
from ladderstitch.text.messages import Step
from ladderstitch.text.scheduler.block_manager import BlockManager
from ladderstitch.text.scheduler.cache_changes import CacheChanges, Repair
from ladderstitch.text.scheduler.queue import SequenceQueue
from ladderstitch.text.scheduler.scheduler import TextScheduler
from ladderstitch.text.scheduler.sequence import Sequence
from ladderstitch.text.scheduler.step_times import StepTimes


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to an answer that had `at` tokens.

    With a `variant`, it changed to that one; with `repaired` tokens, that many were computed again;
    with neither, it lost its blocks.
    """

    at: int
    variant: int | None = None
    repaired: int = 0

    @property
    def is_restart(self) -> bool:
        """Whether the answer lost its blocks."""
        return self.variant is None and not self.repaired


Schedules = defaultdict[tuple[int, ...], list[Event]]
"""The events of answers, by their prompts."""


class RecordingQueue(SequenceQueue):
    """A queue that records which answers lose their blocks."""

    def __init__(self, block_manager: BlockManager, max_sequences: int) -> None:
        super().__init__(block_manager, max_sequences)
        self.schedules = Schedules(list)

    def restart(self, sequence: Sequence) -> None:
        """Release the blocks because of a change of path, which is recorded itself."""
        super()._preempt(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self.schedules[sequence.request.tokens].append(Event(sequence.num_generated))
        super()._preempt(sequence)


class RecordingChanges(CacheChanges):
    """Changes of path and repairs that are recorded in a `RecordingQueue`."""

    def change(self, sequence: Sequence, variant: int, mode: CacheMode) -> None:
        """Move a sequence to a variant."""
        self._record(sequence, Event(sequence.num_generated, variant))
        super().change(sequence, variant, mode)

    def next_repair(self, times: StepTimes, now: float) -> Repair | None:
        """Return the next repair, which the scheduler runs at once."""
        repair = super().next_repair(times, now)
        if repair is not None:
            event = Event(repair.sequence.num_generated, repaired=len(repair.tokens.tokens))
            self._record(repair.sequence, event)
        return repair

    def _record(self, sequence: Sequence, event: Event) -> None:
        assert isinstance(self.queue, RecordingQueue)
        self.queue.schedules[sequence.request.tokens].append(event)


def record(scheduler: TextScheduler) -> Schedules:
    """Return the schedules of all answers from now on; the queue must be a `RecordingQueue`."""
    queue = scheduler._queue
    assert isinstance(queue, RecordingQueue)
    scheduler._runner.cache_changes = RecordingChanges(scheduler.cache_rules, queue)
    return queue.schedules


def comparable_tokens(events: Events[Event], count: int) -> int:
    """Return how many of the first tokens of an answer a replay must repeat.

    A path may compute an answer that lost its blocks in part before another one goes on; the
    schedule does not say in which part.
    """
    for first, second in pairwise(events):
        if first.is_restart and first.at == second.at > 0 and not second.is_restart:
            return first.at
    return count


class Replay:
    """The schedule of one answer that runs alone, in the place of the scheduler's own decisions."""

    def __init__(self, scheduler: TextScheduler, events: Events[Event], mode: CacheMode) -> None:
        self._scheduler, self._mode = scheduler, mode
        self._left = [event for event in events if event.at]
        self._step = scheduler.step
        # Without repairs of its own, `anytime` is `project`.
        own: CacheMode = "project" if mode == "anytime" else mode
        scheduler.apply_settings(SchedulerSettings(cache_mode=own, change_variants=False))
        scheduler.step = self.step  # type: ignore[method-assign] # an instance's method

    def close(self) -> None:
        """Let the scheduler decide again."""
        self._scheduler.step = self._step  # type: ignore[method-assign]

    async def step(self) -> bool:
        """Do what happened before the next token, and run a step."""
        for sequence in list(self._scheduler._queue.active):
            while self._left and self._left[0].at <= sequence.num_generated:
                event = self._left.pop(0)
                if event.repaired:
                    await self._repair(sequence, event.repaired)
                elif event.variant is None or self._mode == "recompute":
                    self._restart(sequence, event)
                    break
                else:
                    changes = self._scheduler._runner.cache_changes
                    changes.change(sequence, event.variant, self._mode)
        return await self._step()

    def _restart(self, sequence: Sequence, event: Event) -> None:
        """Let a sequence start over on the last path of its events before the next token."""
        while self._left and self._left[0].at == event.at and self._can_join(self._left[0]):
            following = self._left.pop(0)
            event = following if following.variant is not None else event
        if event.variant is not None:
            sequence.change_variant(event.variant, "recomputed")
        self._scheduler._queue.restart(sequence)

    def _can_join(self, event: Event) -> bool:
        return event.is_restart or self._mode == "recompute"

    async def _repair(self, sequence: Sequence, num_tokens: int) -> None:
        tokens = sequence.next_repair(num_tokens)
        assert tokens is not None
        assert len(tokens.tokens) == num_tokens
        assert self._scheduler.block_manager.reclaim(tokens.blocks)
        await self._scheduler.group.run(Step((tokens,), sequence.variant))
        sequence.mark_repaired(tokens)

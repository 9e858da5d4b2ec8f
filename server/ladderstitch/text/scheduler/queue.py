"""Who is computed on and who waits, and the blocks of the cache that they share."""

from __future__ import annotations

from ladderstitch.text.scheduler.block_manager import BlockManager
from ladderstitch.text.scheduler.planner import SchedulerLoad, StepPlan
from ladderstitch.text.scheduler.sequence import Sequence_
from ladderstitch.text.scheduler.step_times import StepTimes


class SequenceQueue:
    """Active sequences hold blocks, waiting ones hold none; changed between steps only, but for
    callers who leave.

    At most `max_sequences` are active at a time.
    """

    def __init__(self, pool: BlockManager, max_sequences: int) -> None:
        self.pool = pool
        self.active: list[Sequence_] = []
        self.waiting: list[Sequence_] = []
        self._max_sequences = max_sequences

    @property
    def empty(self) -> bool:
        return not self.active and not self.waiting

    def load(self) -> SchedulerLoad:
        return SchedulerLoad.of(self.active, self.waiting)

    def reusable(self, path: int, tenant: str, tokens: tuple[int, ...]) -> int:
        """Tokens of a prompt whose keys and values are in the cache."""
        prefix = self.pool.find(self.pool.scope((path, tenant)), tokens)
        return len(prefix.blocks) * self.pool.block_tokens

    def leave(self, sequence: Sequence_) -> None:
        """Free what it holds. A step that still writes there ends before the next one begins."""
        sequence.ended = True
        if sequence in self.active:
            self.active.remove(sequence)
            sequence.retreat(self.pool)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def admit(self, times: StepTimes, now: float) -> None:
        """Let the most urgent in for whom there is room, and a block more for each who grows."""
        self.waiting.sort(key=lambda s: s.due(times.expected(s.path, 1)))
        while self.waiting and len(self.active) < self._max_sequences:
            first = self.waiting[0]
            spare = self.pool.free - self.pool.needed(len(first.tokens))
            if (self.active and spare < len(self.active)) or not first.admit(self.pool, now):
                return
            self.active.append(self.waiting.pop(0))

    def make_room(self, plan: StepPlan, times: StepTimes) -> tuple[StepPlan, int]:
        """A block for every sequence of a plan that needs one, taken if none is free from those
        with most time left; what remains of the plan, and how many had to give way."""
        kept, preempted = list(plan.parts), 0
        for part in plan.parts:
            while part in kept and not part.sequence.grow(self.pool):
                victim = max(self.active, key=lambda s: s.due(times.expected(s.path, 1)))
                self._retreat(victim)
                preempted += 1
                kept = [other for other in kept if other.sequence is not victim]
        return StepPlan(plan.path, tuple(kept)), preempted

    def start_again(self) -> None:
        """The caches are lost: everyone waits, and nothing is remembered."""
        for sequence in list(self.active):
            self._retreat(sequence)
            sequence.losses += 1
        self.pool.forget()

    def _retreat(self, sequence: Sequence_) -> None:
        sequence.retreat(self.pool)
        self.active.remove(sequence)
        self.waiting.append(sequence)

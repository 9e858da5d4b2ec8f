"""The active and the waiting sequences, and the allocation of cache blocks to them."""

from __future__ import annotations

from ladderstitch.scheduling.generation import GenerationRequest
from ladderstitch.text.scheduler.block_manager import BlockManager
from ladderstitch.text.scheduler.decode_load import SchedulerLoad
from ladderstitch.text.scheduler.planner import StepPlan
from ladderstitch.text.scheduler.sequence import Sequence
from ladderstitch.text.scheduler.step_times import StepTimes


class SequenceQueue:
    """All sequences in progress: active ones hold blocks, waiting ones hold none.

    At most `max_sequences` are active. Sequences change between the two sets only between steps;
    `remove` may be called at any time.
    """

    def __init__(self, block_manager: BlockManager, max_sequences: int) -> None:
        self.block_manager = block_manager
        self.active: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self._max_sequences = max_sequences

    @property
    def empty(self) -> bool:
        """Whether no sequence is in progress."""
        return not self.active and not self.waiting

    def load(self, times: StepTimes, now: float) -> SchedulerLoad:
        """Return the load that all sequences in progress are for a new request."""
        return SchedulerLoad.from_sequences(self.active, self.waiting, times, now)

    def cached_tokens(self, request: GenerationRequest, num_variants: int) -> dict[int, int]:
        """Return by variant how many of a prompt's tokens the prefix cache holds."""
        namespaces = (
            self.block_manager.namespace((variant, request.tenant))
            for variant in range(num_variants)
        )
        prefixes = (self.block_manager.match_prefix(n, request.tokens) for n in namespaces)
        size = self.block_manager.block_tokens
        return {variant: len(prefix.blocks) * size for variant, prefix in enumerate(prefixes)}

    def add(self, sequence: Sequence) -> None:
        """Add a new sequence, which waits for blocks."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """End a sequence and free its blocks; removing it again changes nothing.

        A running step may still write to the blocks: it ends before the next step uses them.
        """
        sequence.ended = True
        if sequence in self.active:
            self.active.remove(sequence)
            sequence.block_table.release(self.block_manager)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def admit(self, times: StepTimes, now: float) -> None:
        """Activate the most urgent waiting sequences while blocks are free.

        One block for every active sequence stays free, so that each of them can grow.
        """
        self.waiting.sort(key=lambda s: s.pace.deadline(times.expected(s.variant, 1)))
        while self.waiting and len(self.active) < self._max_sequences:
            first = self.waiting[0]
            needed = self.block_manager.blocks_for(len(first.tokens))
            spare = self.block_manager.num_free - needed
            if self.active and spare < len(self.active):
                return
            if not first.allocate_blocks(self.block_manager, now):
                return
            self.active.append(self.waiting.pop(0))

    def make_room(self, plan: StepPlan, times: StepTimes) -> tuple[StepPlan, int]:
        """Allocate a block for every sequence of a plan that needs one.

        While none is free, the sequence with the latest token deadline is preempted. Return the
        plan without preempted sequences, and the number of preemptions.
        """
        kept, num_preempted = list(plan.chunks), 0
        for chunk in plan.chunks:
            table, num_tokens = chunk.sequence.block_table, len(chunk.sequence.tokens)
            while chunk in kept and not table.extend(self.block_manager, num_tokens):
                victim = max(
                    self.active, key=lambda s: s.pace.deadline(times.expected(s.variant, 1))
                )
                self._preempt(victim)
                num_preempted += 1
                kept = [other for other in kept if other.sequence is not victim]
        return StepPlan(plan.variant, tuple(kept)), num_preempted

    def restart(self, sequence: Sequence) -> None:
        """Release the blocks of an active sequence, which is then computed from its first token."""
        self._preempt(sequence)

    def reset_all(self) -> None:
        """Preempt every active sequence and clear the prefix cache, because the caches are lost."""
        for sequence in list(self.active):
            self._preempt(sequence)
            sequence.num_rank_losses += 1
        self.block_manager.clear()

    def abandon_all(self) -> list[Sequence]:
        """Remove and return all sequences, and free all blocks, in whatever state they are."""
        removed = [*self.active, *self.waiting]
        self.active.clear()
        self.waiting.clear()
        self.block_manager.reset()
        return removed

    def _preempt(self, sequence: Sequence) -> None:
        sequence.block_table.release(self.block_manager)
        self.active.remove(sequence)
        self.waiting.append(sequence)

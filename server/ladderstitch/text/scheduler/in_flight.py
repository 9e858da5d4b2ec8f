"""The sequences in progress, how they end, and what their number is reported as."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from ladderstitch.errors import InternalError, NonFiniteOutput, RequestError
from ladderstitch.telemetry.text_observer import Occupancy
from ladderstitch.text.scheduler.guarded_observer import GuardedObserver
from ladderstitch.text.scheduler.queue import SequenceQueue
from ladderstitch.text.scheduler.sequence import Sequence


class InFlightSequences:
    """The sequences of a queue; each change of their number is reported to an observer."""

    def __init__(self, queue: SequenceQueue, observer: GuardedObserver) -> None:
        self.queue, self._observer = queue, observer
        self.changed = asyncio.Event()
        """Set when a sequence is added or removed; who waits for it clears it before."""
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_waiting(self) -> int:
        """The number of sequences without blocks."""
        return len(self.queue.waiting)

    @property
    def num_running(self) -> int:
        """The number of sequences that hold blocks."""
        return len(self.queue.active)

    @property
    def occupancy(self) -> Occupancy:
        """The numbers of sequences, and the share of the cache in use."""
        blocks = self.queue.block_manager
        return Occupancy(self.num_waiting, self.num_running, blocks.num_used / blocks.num_blocks)

    async def wait_idle(self) -> None:
        """Return when no sequence is in progress."""
        await self._idle.wait()

    def report(self) -> None:
        """Report the numbers of sequences and the share of the cache in use."""
        self._observer.observe_occupancy(self.occupancy)

    def add(self, sequence: Sequence) -> None:
        """Add a new sequence, which waits for blocks."""
        self.queue.add(sequence)
        self._idle.clear()
        self.changed.set()
        self.report()

    def remove(self, sequence: Sequence) -> None:
        """End a sequence and free its blocks; removing it again changes nothing."""
        self.queue.remove(sequence)
        self.changed.set()
        if self.queue.empty:
            self._idle.set()
        self.report()

    def fail(self, sequences: Iterable[Sequence], error: RequestError) -> None:
        """End sequences with an error, unless they have ended already."""
        for sequence in sequences:
            if not sequence.ended:
                sequence.fail(error)
                if isinstance(error, NonFiniteOutput):
                    self._observer.observe_non_finite()
            self.remove(sequence)

    def fail_all(self, error: RequestError) -> None:
        """End all sequences with an error."""
        self.fail([*self.queue.active, *self.queue.waiting], error)

    def fail_by(self, error: Exception, sequences: Iterable[Sequence], what: str) -> None:
        """End sequences with what raised `error`; log one that no caller is meant to see."""
        if not isinstance(error, RequestError):
            error = InternalError.logged(what, error)
        self.fail(sequences, error)

    def abandon_all(self, error: RequestError) -> None:
        """End all sequences with an error, in whatever state they and their blocks are."""
        for sequence in self.queue.abandon_all():
            if not sequence.ended:
                sequence.fail(error)
        self._idle.set()

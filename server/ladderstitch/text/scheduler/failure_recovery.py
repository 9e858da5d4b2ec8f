"""What becomes of the sequences after a failed step, a lost rank, or an end of the loop."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from ladderstitch.errors import EngineRestarting, InternalError
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.engine.rank_handle import RankLost
from ladderstitch.text.scheduler.guarded_observer import GuardedObserver
from ladderstitch.text.scheduler.in_flight import InFlightSequences
from ladderstitch.text.scheduler.planner import StepPlan
from ladderstitch.text.scheduler.sequence import Sequence

log = logging.getLogger(__name__)

MAX_RANK_LOSSES = 8
"""Rank losses that one sequence survives; more than these are not a coincidence."""


class FailureRecovery:
    """The recovery of a text scheduler: sequences resume, or end with an error."""

    def __init__(
        self, group: RankGroup, in_flight: InFlightSequences, observer: GuardedObserver
    ) -> None:
        self._group, self._in_flight, self._observer = group, in_flight, observer
        self._apart: list[Sequence] = []
        """Sequences of a step that failed, which run one by one until one of them fails alone."""

    def next_sequences(self) -> list[Sequence]:
        """Return the sequences of which the next step takes some: all active ones.

        After a step of several sequences failed, each of them runs alone, so that one of them
        cannot make the others fail.
        """
        active = self._in_flight.queue.active
        self._apart = [sequence for sequence in self._apart if not sequence.ended]
        apart = [sequence for sequence in self._apart if sequence in active]
        return apart[:1] or active

    def mark_executed(self, sequences: Iterable[Sequence]) -> None:
        """Let sequences whose step did not fail run with others again."""
        for sequence in sequences:
            if sequence in self._apart:
                self._apart.remove(sequence)

    def fail_step(self, error: Exception, plan: StepPlan | None) -> None:
        """End the sequence of a step that failed; several ones run again, each of them alone.

        Without a plan, all sequences end.
        """
        queue = self._in_flight.queue
        if plan is None:
            sequences = [*queue.active, *queue.waiting]
        else:
            sequences = [s for s in plan.sequences if not s.ended]
        if plan is not None and len(sequences) > 1:
            log.warning("a step of sequences=%d failed; each runs alone: %s", len(sequences), error)
            self._apart = sequences
        else:
            self._in_flight.fail_by(error, sequences, "a step failed")

    async def wait_for_ranks(self, error: RankLost) -> None:
        """Wait until all ranks are ready; the caches are lost, so all sequences start over."""
        in_flight = self._in_flight
        log.warning("rank lost, active_sequences=%d: %s", in_flight.num_running, error)
        in_flight.queue.reset_all()
        exhausted = [s for s in in_flight.queue.waiting if s.num_rank_losses > MAX_RANK_LOSSES]
        in_flight.fail(exhausted, EngineRestarting(f"too many ranks were lost: {error}"))
        in_flight.report()
        try:
            await self._group.wait_ready()
        except EngineRestarting as failure:
            in_flight.fail_all(failure)

    def resume(self, error: BaseException, ends_in_row: int) -> None:
        """Prepare all sequences for a loop that starts again after an unexpected end.

        They end with an error if this is not the first of `ends_in_row`.
        """
        failure = InternalError.logged("the scheduler's loop ended and is started again", error)
        self._observer.observe_restart()
        self._apart = []
        try:
            self._in_flight.queue.reset_all()
            if ends_in_row > 1:
                self._in_flight.fail_all(failure)
        except Exception:
            log.exception("the sequences cannot be resumed")
            self._in_flight.abandon_all(failure)
        self._in_flight.report()

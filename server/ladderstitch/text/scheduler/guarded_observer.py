"""An observer whose failures do not reach the scheduler or its callers."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ladderstitch.scheduling.generation import GenerationInfo, GenerationUsage
from ladderstitch.telemetry.text_observer import Occupancy, StepReport, TextObserver

log = logging.getLogger(__name__)


class GuardedObserver:
    """A `TextObserver` that passes every call on; an error of it is logged and counted.

    An answer does not depend on whether it can be counted.
    """

    def __init__(self, observer: TextObserver) -> None:
        self._observer = observer
        self.failures = 0
        """Calls that raised an error."""

    def observe_step(self, step: StepReport, occupancy: Occupancy) -> None:
        """Count a finished step."""
        self._try(lambda: self._observer.observe_step(step, occupancy))

    def observe_occupancy(self, occupancy: Occupancy) -> None:
        """Report the requests in progress and the cache in use."""
        self._try(lambda: self._observer.observe_occupancy(occupancy))

    def observe_preemptions(self, num_sequences: int) -> None:
        """Count sequences whose blocks were given to others."""
        self._try(lambda: self._observer.observe_preemptions(num_sequences))

    def observe_variant_changes(self, num_sequences: int) -> None:
        """Count sequences that go on with another variant."""
        self._try(lambda: self._observer.observe_variant_changes(num_sequences))

    def observe_translation(self, num_tokens: int) -> None:
        """Count cached tokens that were translated for another variant."""
        if num_tokens:
            self._try(lambda: self._observer.observe_translation(num_tokens))

    def observe_repair(self, num_tokens: int, seconds: float) -> None:
        """Count translated tokens that were computed again in idle time."""
        self._try(lambda: self._observer.observe_repair(num_tokens, seconds))

    def observe_first_token(self, queue_s: float, seconds: float) -> None:
        """Count a first token."""
        self._try(lambda: self._observer.observe_first_token(queue_s, seconds))

    def observe_next_token(self, gap_s: float) -> None:
        """Count a later token."""
        self._try(lambda: self._observer.observe_next_token(gap_s))

    def observe_completion(self, answer: GenerationInfo, usage: GenerationUsage) -> None:
        """Count a complete answer."""
        self._try(lambda: self._observer.observe_completion(answer, usage))

    def observe_rejection(self, code: str, *, had_budget: bool) -> None:
        """Count a request that ended with a status."""
        self._try(lambda: self._observer.observe_rejection(code, had_budget=had_budget))

    def observe_non_finite(self) -> None:
        """Count a request whose outputs were infinite or not a number."""
        self._try(lambda: self._observer.observe_non_finite())

    def observe_restart(self) -> None:
        """Count a scheduler whose loop ended unexpectedly and was started again."""
        self._try(lambda: self._observer.observe_restart())

    def observe_failure(self) -> None:
        """Count a call of an observer that failed."""
        self._observer.observe_failure()

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:
            self._report()

    def _report(self) -> None:
        """Log the first of 1, 2, 4, 8, ... failures, since every token may cause one."""
        self.failures += 1
        if self.failures & (self.failures - 1) == 0:
            log.exception("an observer failed, failures=%d", self.failures)
        try:
            self.observe_failure()
        except Exception as error:
            log.debug("the failure of an observer could not be counted: %s", error)

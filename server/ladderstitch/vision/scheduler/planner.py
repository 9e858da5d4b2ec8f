"""The planner of one engine: queue, admission, policy and latency model, without a clock or I/O.

The server's scheduler and the load test's simulator drive the same object, the one with the
machine's clock and the other with a virtual clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ladderstitch.errors import BudgetInfeasible, InvalidArgument, Overloaded, RequestError
from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.cascades import NO_CASCADES, CascadeSet
from ladderstitch.scheduling.latency_model import LatencyModel
from ladderstitch.scheduling.load_report import HORIZONS_S, LoadReport
from ladderstitch.scheduling.profiles import LatencyProfile
from ladderstitch.scheduling.requests import Request
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.vision.scheduler import admission
from ladderstitch.vision.scheduler.cascade_choice import (
    CascadeChooser,
    count_needs,
    expected_seconds,
)
from ladderstitch.vision.scheduler.policies import make_policy
from ladderstitch.vision.scheduler.policies.adaptive import Adaptive
from ladderstitch.vision.scheduler.policies.base import Decision, Defer
from ladderstitch.vision.scheduler.policies.baselines import ModelSwitching
from ladderstitch.vision.scheduler.policies.demand import QualityHulls
from ladderstitch.vision.scheduler.policies.forecast import Arrivals
from ladderstitch.vision.scheduler.queue import DeadlineQueue
from ladderstitch.vision.scheduler.recorder import PlannerRecorder

EWMA_ALPHA = 0.1
"""Weight of the latest batch in the moving average of batch seconds."""


class Planner:
    """The state from which the next batch is decided.

    All times are seconds on the clock of the requests. Raises `InvalidArgument` if the settings do
    not fit the model.
    """

    def __init__(
        self,
        quality: Mapping[int, float],
        profile: LatencyProfile,
        settings: SchedulerSettings,
        recorder: PlannerRecorder | None = None,
        cascades: CascadeSet = NO_CASCADES,
    ) -> None:
        self.quality = quality
        self.cascades = cascades
        self.latency = LatencyModel(profile, settings.attainment_probability)
        self.queue = DeadlineQueue(settings.priority_window_s)
        self.busy_until = 0.0
        """Instant at which the running batch is expected to end; 0 while the engine is idle."""
        self.mean_batch_s = 0.0
        """Moving average of the seconds that batches took."""
        self._arrivals = Arrivals()
        self._recorder = recorder
        if recorder is not None:
            recorder.on_created(quality, profile, cascades)
        self.configure(settings)

    def configure(self, settings: SchedulerSettings) -> None:
        """Apply other settings from the next batch on; waiting requests stay in the queue.

        Raises `InvalidArgument` if the model lacks a variant or the floor that they name.
        """
        admission.check_settings(settings, self.quality)
        if settings.priority_window_s != self.queue.priority_window_s:
            waiting = list(self.queue.view)
            self.queue = DeadlineQueue(settings.priority_window_s)
            for request in waiting:
                self.queue.add(request)
        self.latency.set_probability(settings.attainment_probability)
        self.settings = settings
        self.candidates = CandidateFilter.from_settings(
            self.quality, self.latency.profile, settings
        )
        self.chooser = CascadeChooser(self.cascades, self.candidates, settings.overhead_s)
        hulls = QualityHulls.from_profile(
            self.candidates.frontier, self.quality, self.latency.view.profiled
        )
        self.policy = make_policy(settings, self.candidates, self._arrivals.forecast, hulls)
        if self._recorder is not None:
            self._recorder.on_configured(settings)

    def load(self, now: float) -> admission.QueueLoad:
        """Return the load that admission control takes into account."""
        busy_s = max(0.0, self.busy_until - now)
        return admission.QueueLoad(now, busy_s, len(self.queue), self.queue.num_images)

    def wait_s(self, request: Request, now: float) -> float:
        """Return the seconds of other work before this request would run if it were added now."""
        busy_s = max(0.0, self.busy_until - now)
        if not self.queue:
            return busy_s
        ahead = self.queue.images_before(request)
        return busy_s + admission.estimate_work_s(ahead, self.candidates, self.latency.view)

    def load_report(self, now: float) -> LoadReport:
        """Return the seconds that a new request would wait, for each horizon."""
        busy_s = max(0.0, self.busy_until - now)
        candidates, view = self.candidates, self.latency.view
        images_due = [self.queue.images_due(now + due_s) for due_s in HORIZONS_S]
        return LoadReport(
            waits_s=tuple(
                busy_s + admission.estimate_work_s(ahead, candidates, view) for ahead in images_due
            ),
            request_s=view.expected(candidates.for_quality()[0], 1),
            batch_s=self.mean_batch_s,
        )

    def check_budget(
        self, budget_s: float | None, min_quality: float, now: float
    ) -> admission.BudgetCheck:
        """Return the variants that one image could get within a budget, now and when idle.

        Raises `QualityUnavailable` if no variant has the requested quality.
        """
        return admission.check_budget(
            budget_s, min_quality, self.candidates, self.latency.view, self.load(now), self.settings
        )

    def admit(self, request: Request, now: float, *, alone: bool) -> None:
        """Raise the `RequestError` that rejects a request, or return if the request is admitted.

        `alone` says that no other request waits or runs.
        """
        try:
            self._check_confidence(request)
            ahead = self.queue.images_before(request)
            load, view = self.load(now), self.latency.view
            admission.check_request(request, self.candidates, view, load, ahead, self.settings)
        except RequestError as error:
            if alone and isinstance(error, BudgetInfeasible | Overloaded):
                self.latency.decay_after_idle_rejection()
            if self._recorder is not None:
                self._recorder.on_admission(request, now, alone=alone, rejected=True)
            raise
        if self._recorder is not None:
            self._recorder.on_admission(request, now, alone=alone, rejected=False)

    def _check_confidence(self, request: Request) -> None:
        """Raise `InvalidArgument` if the request wants confidences that the model does not have."""
        if request.min_confidence > 0 and not self.cascades.temperatures:
            raise InvalidArgument(
                "min_confidence",
                "expected none: this model has no calibrated confidences; `calibrate` adds them",
            )

    def add(self, request: Request) -> None:
        """Queue an admitted request, and learn from its arrival."""
        self.queue.add(request)
        self.chooser.prepare(request)
        self._arrivals.add(request)
        if isinstance(self.policy, Adaptive | ModelSwitching):
            self.policy = replace(self.policy, forecast=self._arrivals.forecast)
        if self._recorder is not None:
            self._recorder.on_added(request)

    def requeue(self, request: Request) -> None:
        """Queue a request again whose batch was lost."""
        self.queue.add(request)
        if self._recorder is not None:
            self._recorder.on_requeued(request)

    def remove(self, request: Request) -> None:
        """Remove a request from the queue. Raises `ValueError` if it is not there."""
        self.queue.remove(request)
        if self._recorder is not None:
            self._recorder.on_removed(request)

    def clear(self) -> None:
        """Remove all requests from the queue, whatever state it is in."""
        waiting = list(self.queue.view)
        self.queue = DeadlineQueue(self.settings.priority_window_s)
        if self._recorder is not None:
            for request in waiting:
                self._recorder.on_removed(request)

    def remove_expired(self, now: float) -> list[Request]:
        """Remove and return the requests that cannot end before their hard deadline.

        Such a request would be late even alone on the fastest variant, at the lowest of the recent
        residuals.
        """
        view = self.latency.view
        alone_s = view.expected(self.candidates.frontier[0], 1) * view.residuals[0]
        expired = self.queue.remove_expired(now + alone_s)
        if expired and self._recorder is not None:
            self._recorder.on_expired(expired, now)
        return expired

    def decide(self, now: float) -> Decision | Defer:
        """Return the next batch, removed from the queue, or the seconds to defer.

        The queue must not be empty.
        """
        view = self.latency.view
        choice = self.policy(self.queue.view, view, now + view.dispatch_overhead_s)
        if isinstance(choice, Decision):
            for request in choice.requests:
                self.queue.remove(request)
            chosen = self.chooser.choose(choice, self.queue.view, view, now)
            for request in choice.requests if len(chosen.requests) < len(choice.requests) else ():
                if request not in chosen.requests:
                    self.queue.add(request)
            choice = chosen
        if self._recorder is not None:
            self._recorder.on_decision(choice, now)
        return choice

    def expected_s(self, decision: Decision) -> float:
        """Return the expected seconds of compute of a batch."""
        view = self.latency.view
        if decision.cascade is None:
            return view.expected(decision.variant, decision.num_images)
        return expected_seconds(decision.cascade, count_needs(decision.requests), view)

    def on_batch_started(
        self, batch_size: int, variant: int, now: float, expected_s: float | None = None
    ) -> None:
        """Note that a batch that was decided at `now` went to the engine.

        `expected_s` are the expected seconds of a cascade.
        """
        seconds = self.latency.view.expected(variant, batch_size)
        self.busy_until = now + (seconds if expected_s is None else expected_s)
        if self._recorder is not None:
            self._recorder.on_batch_started(batch_size, variant, now, expected_s)

    def on_batch_finished(
        self, variant: int, batch_size: int, compute_s: float, total_s: float
    ) -> float:
        """Learn from a batch that was answered; return actual over expected seconds.

        Of a cascade, learn from its first variant only, without the seconds of the last one.
        """
        self.latency.observe_dispatch_overhead(total_s - compute_s)
        self.mean_batch_s += EWMA_ALPHA * (total_s - self.mean_batch_s)
        error = self.latency.observe(variant, batch_size, compute_s)
        if self._recorder is not None:
            self._recorder.on_batch_finished(variant, batch_size, compute_s, total_s)
        return error

    def on_engine_idle(self) -> None:
        """Note that no batch runs."""
        self.busy_until = 0.0
        if self._recorder is not None:
            self._recorder.on_engine_idle(flush=not self.queue)

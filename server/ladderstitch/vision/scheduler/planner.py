"""What runs next: queue, admission, policy and latency model of one engine, without clock or I/O.

The server's scheduler and the load test's simulator drive the same object, one by the machine's
clock, the other by a virtual one.
"""

from __future__ import annotations

from collections.abc import Mapping

from ladderstitch.errors import BudgetInfeasible, Overloaded, RequestError
from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.latency_model import LatencyModel
from ladderstitch.scheduling.load_report import HORIZONS_S, LoadReport
from ladderstitch.scheduling.profiles import LatencyProfile
from ladderstitch.scheduling.requests import Request
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.vision.scheduler import admission
from ladderstitch.vision.scheduler.policies import make_policy
from ladderstitch.vision.scheduler.policies.base import Decision, Defer
from ladderstitch.vision.scheduler.policies.demand import Arrivals
from ladderstitch.vision.scheduler.policies.quality_hull import QualityHulls
from ladderstitch.vision.scheduler.queue import DeadlineQueue

FORECASTING = frozenset({"adaptive", "model_switching"})
"""Policies that are told anew what to expect as requests come."""

LEARNING = 0.1
"""Weight of the newest batch in what batches take."""


class Planner:
    """All times are seconds on the clock of the requests; `busy_until` is 0 while nothing runs.

    Raises `InvalidArgument` if the settings do not fit the model.
    """

    def __init__(
        self, quality: Mapping[int, float], profile: LatencyProfile, settings: SchedulerSettings
    ) -> None:
        self.quality = quality
        self.latency = LatencyModel(profile, settings.attainment_probability)
        self.queue = DeadlineQueue(settings.priority_window_s)
        self.busy_until = 0.0
        self.batch_s = 0.0
        """What batches took of late."""
        self._arrivals = Arrivals()
        self.configure(settings)

    def configure(self, settings: SchedulerSettings) -> None:
        """Use other settings from the next batch on; requests that wait keep waiting.

        Raises `InvalidArgument` if they name a variant or a floor that this model does not have.
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
        self._hulls = QualityHulls.of(
            self.candidates.frontier, self.quality, self.latency.view.profiled
        )
        self._renew()

    def load(self, now: float) -> admission.QueueLoad:
        """What admission knows of the present."""
        busy_s = max(0.0, self.busy_until - now)
        return admission.QueueLoad(now, busy_s, len(self.queue), self.queue.num_images)

    def wait_s(self, request: Request, now: float) -> float:
        """Seconds of other work before this request would run, if it were added now."""
        busy_s = max(0.0, self.busy_until - now)
        if not self.queue:
            return busy_s
        ahead = self.queue.images_before(request)
        return busy_s + admission.work_s(ahead, self.candidates, self.latency.view)

    def load_report(self, now: float) -> LoadReport:
        """What others have to wait for here, by how urgent they are."""
        busy_s = max(0.0, self.busy_until - now)
        candidates, view = self.candidates, self.latency.view
        batch_size = [self.queue.images_due(now + due_s) for due_s in HORIZONS_S]
        return LoadReport(
            waits_s=tuple(
                busy_s + admission.work_s(ahead, candidates, view) for ahead in batch_size
            ),
            request_s=view.expected(candidates.for_quality()[0], 1),
            batch_s=self.batch_s,
        )

    def check_budget(
        self, budget_s: float | None, min_quality: float, now: float
    ) -> admission.BudgetCheck:
        """What could be had within a budget, now and when idle."""
        return admission.check_budget(
            budget_s, min_quality, self.candidates, self.latency.view, self.load(now), self.settings
        )

    def admit(self, request: Request, now: float, *, alone: bool) -> None:
        """Raise the `RequestError` that says why a request is refused, if it is.

        `alone` says that nothing else waits or runs.
        """
        try:
            ahead = self.queue.images_before(request)
            load = self.load(now)
            admission.admit(request, self.candidates, self.latency.view, load, ahead, self.settings)
        except RequestError as error:
            if alone and isinstance(error, BudgetInfeasible | Overloaded):
                self.latency.decay_after_idle_rejection()
            raise

    def add(self, request: Request) -> None:
        """Queue an admitted request, and let the policy know of the traffic."""
        self.queue.add(request)
        if self._arrivals.add(request) and self.settings.policy in FORECASTING:
            self.policy = make_policy(
                self.settings, self.candidates, self._arrivals.forecast, self._hulls
            )

    def requeue(self, request: Request) -> None:
        """Queue a request again whose batch was lost."""
        self.queue.add(request)

    def remove(self, request: Request) -> None:
        """Take a request off the queue; raises `ValueError` if it does not wait."""
        self.queue.remove(request)

    def take_expired(self, now: float) -> list[Request]:
        """Remove and return the requests that cannot end before their limit any more.

        That is, not even alone on the fastest variant and as fast as it lately was at best.
        """
        view = self.latency.view
        alone_s = view.expected(self.candidates.frontier[0], 1) * view.residuals[0]
        return self.queue.take_expired(now + alone_s)

    def decide(self, now: float) -> Decision | Defer:
        """The next batch, taken off the queue, which must not be empty; or how long to wait."""
        view = self.latency.view
        choice = self.policy(self.queue.view, view, now + view.dispatch_overhead_s)
        if isinstance(choice, Decision):
            for request in choice.requests:
                self.queue.remove(request)
        return choice

    def started(self, batch_size: int, variant: int, now: float) -> None:
        """A batch went to the engine; `now` is when it was decided."""
        self.busy_until = now + self.latency.view.expected(variant, batch_size)

    def finished(self, variant: int, batch_size: int, compute_s: float, total_s: float) -> float:
        """Learn from a batch that came back whole; returns actual over expected seconds."""
        self.latency.observe_dispatch_overhead(total_s - compute_s)
        self.batch_s += LEARNING * (total_s - self.batch_s)
        return self.latency.observe(variant, batch_size, compute_s)

    def _renew(self) -> None:
        forecast = self._arrivals.forecast
        self.policy = make_policy(self.settings, self.candidates, forecast, self._hulls)

    def free(self) -> None:
        """The engine has nothing to do."""
        self.busy_until = 0.0

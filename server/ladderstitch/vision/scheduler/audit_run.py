"""The run of audits while no request waits."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from ladderstitch.errors import InternalError
from ladderstitch.scheduling.requests import ImageAnswer, Request
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.telemetry.model_metrics import VisionMetrics, harmless
from ladderstitch.vision.engine.base import Engine, EngineDied
from ladderstitch.vision.scheduler.audit import Auditor
from ladderstitch.vision.scheduler.planner import Planner

log = logging.getLogger(__name__)


class AuditRunner:
    """The audits of one engine; the dispatch loop runs them instead of waiting for a request."""

    def __init__(
        self,
        engine: Engine,
        planner: Planner,
        auditor: Auditor,
        metrics: VisionMetrics,
        clock: Callable[[], float],
        wake: asyncio.Event,
    ) -> None:
        """Make a runner whose waits end when `wake` is set."""
        self.auditor = auditor
        self._engine, self._planner = engine, planner
        self._metrics, self._clock, self._wake = metrics, clock, wake

    def configure(self, settings: SchedulerSettings) -> None:
        """Apply other settings; only models with calibrated confidences are audited.

        Others return tensors, not classes.
        """
        audits = bool(self._planner.cascades.temperatures)
        self.auditor.share = settings.audit_share if audits else 0.0

    def sample(self, request: Request, answer: ImageAnswer) -> None:
        """Keep an image of the answer for an audit, perhaps."""
        if self.auditor.sample(request, answer, self._planner.candidates.best):
            self._wake.set()  # the dispatch loop may wait for a request already

    async def wait(self) -> None:
        """Wait for the next request, and audit answers while none comes."""
        best, idle_since = self._planner.candidates.best, self._clock()
        while not self._wake.is_set():
            expected_s = self._planner.latency.view.expected(best, 1)
            delay_s = self.auditor.delay_s(expected_s, self._clock(), idle_since)
            if delay_s is None:
                await self._wake.wait()
            elif delay_s:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), delay_s)
            else:
                await self._audit(best)

    async def _audit(self, best: int) -> None:
        """Run one answered image again on the best variant."""
        case, started = self.auditor.take(), self._clock()
        self._planner.on_batch_started(1, best, started)
        try:
            result = await self._engine.forward([case.image], best)
        except (EngineDied, InternalError) as error:
            log.warning("an audit failed: %s", error)
            return
        finally:
            self._planner.on_engine_idle()
        monitor = self.auditor.add(case, result.logits, result.compute_s)
        with harmless("observation of an audit", self._metrics.failures):
            self._metrics.observe_audit(
                case.variant,
                result.compute_s,
                agrees=monitor.recent[-1],
                agreement=monitor.agreement,
                drifted=monitor.drifted,
            )

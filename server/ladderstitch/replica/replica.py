"""One replica: its models, gRPC and HTTP servers, and metrics. It does not depend on Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ladderstitch.api.listener import ListenerConfig, name_port
from ladderstitch.api.rehearsal import rehearse
from ladderstitch.api.server import Server
from ladderstitch.config import ServerConfig
from ladderstitch.hosting.model_manager import ModelManager, make_runner
from ladderstitch.hosting.registry import (
    AdminActions,
    LoadedModel,
    ModelRegistry,
    UpdateSettings,
)
from ladderstitch.replica.watchdog import Watchdog
from ladderstitch.runtime import ProgressCallback
from ladderstitch.runtime.process import shorten_lock_waits, tune_malloc
from ladderstitch.scheduling.settings import ActiveSettings
from ladderstitch.telemetry.logs import RecordSink, log_request, trace_sink
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.telemetry.metrics_server import Probes
from ladderstitch.text.engine.rank_handle import Launcher, launch_process

if TYPE_CHECKING:
    from ladderstitch.api.http_server import HttpServer

log = logging.getLogger(__name__)

DRAIN_GRACE_S = 0.25
"""Seconds to keep accepting calls after SIGTERM, then seconds to reject them with DRAINING.

Only then does the port close: gRPC would cancel late calls without a status.
"""
MAX_LOOP_DELAY_S = 10.0
"""Seconds that the event loop may be held until `/healthz` reports it."""


class Replica:
    """A process that serves models, from `start` to `stop`; no accepted request is lost."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        name: str = "replica",
        update: UpdateSettings | None = None,
        share_port: bool = False,
        launcher: Launcher = launch_process,
        watch_token: str | None = None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """Load the bundle's manifest and create the servers, without listening yet.

        `update` applies an administrator's changes of settings (unset: to this replica only),
        `launcher` starts the ranks of a language model, and `watch_token` is a token with which
        gateways may watch the load if callers need tokens. `on_failure` is called once if a model
        answers no requests any more, so that the process has to be replaced. Raises `BundleError`,
        and `ConfigError` for certificates or tokens that cannot be used.
        """
        tune_malloc()
        shorten_lock_waits()
        self.config = config
        self.registry = ModelRegistry(name, active_settings=ActiveSettings(0, config.scheduling))
        self.metrics = Metrics(keeps_activity=config.serves_page)
        self.share_port = share_port
        self.models = ModelManager(
            config,
            self.registry,
            make_runner(config, self.registry, self.metrics, launcher),
            # Ray's placement group for ranks belongs to the configured model
            lambda later: make_runner(later, self.registry, self.metrics, launch_process),
            announce=self._announce_unload,
            rehearse=lambda model: rehearse(model, self.server.listener),
            forget=self.metrics.remove_model,
        )
        self.failed = False
        self._on_failure = on_failure
        self._watchdog = Watchdog(self.metrics.event_loop_lag_seconds, self._check_models)
        self._close_traces: Callable[[], None] = lambda: None
        listener = ListenerConfig.from_config(
            config,
            self.metrics.observe_denial,
            self._sinks(name),
            share_port=share_port,
            watch_token=watch_token,
        )
        actions = AdminActions(
            update or self._update_locally, self.drain, self._load, self.models.unload
        )
        self.server = Server(self.registry, actions, listener)
        self.http = self._make_http_server(listener)
        self.metrics_port = 0
        self._close_metrics: Callable[[], None] = lambda: None

    def _make_http_server(self, listener: ListenerConfig) -> HttpServer | None:
        """Return the server of OpenAI's API; None without an HTTP port."""
        if self.config.http_port is None:
            return None
        from ladderstitch.api.http_server import HttpServer
        from ladderstitch.api.openai.app import replica_app  # takes a second to import

        sinks = () if listener.request_log is None else listener.request_log.sinks
        metrics = self.metrics.registry
        application = replica_app(self.config, self.registry, listener.auth, sinks, metrics)
        return HttpServer(self.config, application)

    def _sinks(self, name: str) -> list[RecordSink]:
        """Return the recipients of each request's record: the log, traces, both or none."""
        sinks: list[RecordSink] = [log_request] if self.config.log_requests else []
        if self.config.otlp_endpoint is not None:
            sink, self._close_traces = trace_sink(self.config.otlp_endpoint, name)
            sinks.append(sink)
        return sinks

    @property
    def port(self) -> int:
        """The bound gRPC port."""
        return self.server.port

    @property
    def healthy(self) -> bool:
        """False while a worker or rank restarts; callers then wait or get ENGINE_RESTARTING."""
        return self.models.healthy

    @property
    def alive(self) -> bool:
        """False if a scheduler has ended unexpectedly, so that requests are not answered."""
        return not self.registry.ready or self.registry.draining or self.models.alive

    def _why_not_alive(self) -> str:
        """Return why this process has to be replaced; empty if it does not have to be."""
        behind_s = self._watchdog.seconds_behind()
        if behind_s > MAX_LOOP_DELAY_S:
            return f"the event loop has been held for {behind_s:.0f} s"
        return "" if self.alive else "a model answers no requests any more"

    async def start(self, on_progress: ProgressCallback = lambda done, total: None) -> None:
        """Listen, load and warm up the model, then report ready; `on_progress` gets the progress.

        Raises `ConfigError` that names the port if one is taken, and the runner's error if the
        model cannot start.
        """
        self._watchdog.start()
        with name_port("port"):
            await self.server.start(self.config.host, self.config.port)
        with name_port("http_port"):
            if self.http is not None and self.config.http_port is not None:
                port = await self.http.start(self.config.http_port, share_port=self.share_port)
                self.registry.http_port = port
        with name_port("metrics_port"):
            self.metrics_port, self._close_metrics = self.metrics.expose(
                self.config.metrics_port,
                self.config.host,
                share_port=self.share_port,
                probes=Probes(self._why_not_alive, self.registry.why_not_serving),
            )
        self.registry.metrics_port = self.metrics_port
        await self.models.start(on_progress)
        self.registry.ready = True
        self.models.set_ready(True)
        await self.server.set_serving(True)

    async def _check_models(self) -> None:
        """Report NOT_SERVING while a model does not answer; fail if it never will."""
        if not self.registry.ready or self.registry.draining or self.registry.drain_announced:
            return
        healthy = self.alive and self.healthy
        if healthy != self.registry.healthy:
            self.registry.healthy = healthy
            log.warning("health changed serving=%s", str(healthy).lower())
            await self.server.set_serving(self.registry.serving)
            self.models.set_ready(healthy)
        if not self.alive and not self.failed:
            self.failed = True
            log.critical("a model answers no requests any more; the replica has to be replaced")
            self._on_failure()

    def apply_settings(self, settings: ActiveSettings) -> None:
        """Use these settings from the next batch on, unless newer ones are active."""
        if settings.revision >= self.registry.active_settings.revision:
            self.models.apply_settings(settings)
            self.registry.active_settings = settings

    async def _load(self, bundle: str) -> LoadedModel:
        model = await self.models.load(bundle)
        await self.server.set_serving(self.registry.serving)
        return model

    async def _announce_unload(self, name: str) -> None:
        await self.server.set_unloading(name)

    async def drain(self, announce_s: float = 0.0) -> bool:
        """Report NOT_SERVING, reject requests after `announce_s`, finish the accepted ones.

        Returns whether all accepted requests ended within `drain_s`.
        """
        self.registry.drain_announced = True
        self.models.set_ready(False)
        await self.server.set_serving(False)
        await asyncio.sleep(announce_s)
        self.registry.draining = True
        try:
            await asyncio.wait_for(self.models.drain(), self.config.drain_s)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Drain, then stop the servers and unload all models."""
        await self.drain(announce_s=0.0 if self.registry.draining else DRAIN_GRACE_S)
        await asyncio.sleep(DRAIN_GRACE_S)
        await self.close(grace_s=1.0)

    async def close(self, grace_s: float = 0.0) -> None:
        """Stop the servers and unload all models, also after a start or a stop was cancelled.

        Requests that are still in flight after `grace_s` seconds are cancelled.
        """
        await self._watchdog.stop()
        self.models.set_ready(False)
        await self.server.stop(grace_s)
        if self.http is not None:
            await self.http.stop()
        await self.models.close()
        self._close_metrics()
        await asyncio.to_thread(self._close_traces)

    async def _update_locally(self, changes: dict[str, Any]) -> ActiveSettings:
        """Apply changed settings to this replica only (no Ray deployment)."""
        settings = self.registry.active_settings.with_changes(changes)
        self.apply_settings(settings)
        return settings

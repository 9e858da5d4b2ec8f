"""One replica: a model's runner, the gRPC server and the metrics. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ladderstitch.api.listener import ListenerConfig
from ladderstitch.api.server import Server
from ladderstitch.config import ServerConfig
from ladderstitch.hosting.model_manager import ModelManager, make_runner
from ladderstitch.hosting.registry import (
    AdminActions,
    LoadedModel,
    ModelRegistry,
    ProgressCallback,
    UpdateSettings,
)
from ladderstitch.runtime.process import return_freed_memory
from ladderstitch.scheduling.settings import ActiveSettings
from ladderstitch.telemetry.logs import RecordSink, log_request, trace_sink
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.text.engine.rank_handle import Launcher, launch_process

if TYPE_CHECKING:
    from ladderstitch.api.openai.server import HttpServer

LAME_DUCK_S = 0.25
"""So long, calls on their way to a stopping replica are still taken, and as long again those that
come later are told DRAINING; gRPC would cancel them."""


class Replica:
    """Comes up with `start`, answers, and goes down with `stop` without losing a request."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        name: str = "replica",
        update: UpdateSettings | None = None,
        share_port: bool = False,
        launcher: Launcher = launch_process,
        watch_token: str | None = None,
    ) -> None:
        """`launcher` starts the ranks of a language model; a gateway may watch by `watch_token`,
        where callers need tokens.

        Raises `BundleError`, and `ConfigError` for certificates or tokens that cannot be used.
        """
        return_freed_memory()
        self.config = config
        self.registry = ModelRegistry(name, active_settings=ActiveSettings(0, config.scheduling))
        self.metrics = Metrics()
        self.share_port = share_port
        self.models = ModelManager(
            config,
            self.registry,
            make_runner(config, self.registry, self.metrics, launcher),
            # what Ray set aside for ranks belongs to the configured model
            lambda later: make_runner(later, self.registry, self.metrics, launch_process),
        )
        self._close_traces: Callable[[], None] = lambda: None
        transport = ListenerConfig.of(
            config,
            self.metrics.denied,
            self._sinks(name),
            share_port=share_port,
            watch_token=watch_token,
        )
        control = AdminActions(update or self._update_alone, self.drain, self._load, self._unload)
        self.server = Server(self.registry, control, transport)
        self.http: HttpServer | None = None
        if config.http_port is not None:
            from ladderstitch.api.openai.server import HttpServer  # a second to import

            self.http = HttpServer(config, self.registry, transport.guard)
        self.metrics_port = 0
        self._close_metrics: Callable[[], None] = lambda: None

    def _sinks(self, name: str) -> list[RecordSink]:
        """Who is told of every request."""
        sinks: list[RecordSink] = [log_request] if self.config.log_requests else []
        if self.config.otlp_endpoint is not None:
            sink, self._close_traces = trace_sink(self.config.otlp_endpoint, name)
            sinks.append(sink)
        return sinks

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def healthy(self) -> bool:
        """False while a worker or rank is gone; callers then wait or get ENGINE_RESTARTING."""
        return self.models.healthy

    @property
    def alive(self) -> bool:
        """False if what answers requests has ended although it should not have."""
        return not self.registry.ready or self.registry.draining or self.models.alive

    async def start(self, advance: ProgressCallback = lambda done, total: None) -> None:
        """Listen, load, warm up, then answer.

        Raises `OSError` if a port is taken, and what the runner raises if it cannot come up.
        """
        await self.server.start(self.config.host, self.config.port)
        if self.http is not None and self.config.http_port is not None:
            await self.http.start(self.config.http_port, share_port=self.share_port)
        self.metrics_port, self._close_metrics = self.metrics.expose(
            self.config.metrics_port, self.config.host, share_port=self.share_port
        )
        self.registry.metrics_port = self.metrics_port
        await self.models.start(advance)
        self.registry.ready = True
        self.models.set_ready(True)
        await self.server.set_serving(True)

    def apply(self, live: ActiveSettings) -> None:
        """Schedule by these settings from the next batch on, unless newer ones are in force."""
        if live.revision >= self.registry.active_settings.revision:
            self.models.apply(live)
            self.registry.active_settings = live

    async def _load(self, bundle: str) -> LoadedModel:
        hosted = await self.models.load(bundle)
        await self.server.set_serving(self.registry.serving)
        return hosted

    async def _unload(self, name: str) -> None:
        await self.server.forget(name)
        await self.models.unload(name)

    async def drain(self, announce_s: float = 0.0) -> bool:
        """Readiness first, then no new work, then finish; whether all accepted requests ended."""
        self.registry.leaving = True
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
        """Drain, then exit."""
        await self.drain(announce_s=0.0 if self.registry.draining else LAME_DUCK_S)
        await asyncio.sleep(LAME_DUCK_S)
        await self.server.stop(grace_s=1.0)
        if self.http is not None:
            await self.http.stop()
        await self.models.close()
        self._close_metrics()
        await asyncio.to_thread(self._close_traces)

    async def _update_alone(self, changes: dict[str, Any]) -> ActiveSettings:
        """The say of a replica that has no deployment around it."""
        live = self.registry.active_settings.with_changes(changes)
        self.apply(live)
        return live

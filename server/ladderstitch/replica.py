"""One replica: worker, scheduler, gRPC server and metrics of a bundle. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from typing import Any

from ladderstitch.allocator import return_freed_memory
from ladderstitch.bundle import Bundle
from ladderstitch.config import ServerConfig
from ladderstitch.engine.channel import WorkerConfig
from ladderstitch.engine.hybrid import HybridEngine
from ladderstitch.engine.placement import resolve_device, resolve_dtype
from ladderstitch.engine.process import ProcessEngine
from ladderstitch.engine.warming import warm_up
from ladderstitch.errors import BadInput, BundleError, ConfigError
from ladderstitch.hosting import Host, HostedModel, LiveSettings, UpdateSettings
from ladderstitch.images import ImageReader
from ladderstitch.measurements import QualityTable
from ladderstitch.metrics import Metrics, ModelMetrics
from ladderstitch.scheduling.scheduler import Scheduler
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.service.server import Server, Transport

log = logging.getLogger(__name__)

LAME_DUCK_S = 0.25
"""So long, calls on their way to a stopping replica are told DRAINING; gRPC would cancel them."""

Advance = Callable[[int, int], None]
"""(done, total) of the warm-up."""


LIGHT_BYTES = 32 << 20
"""Bundles up to this size may be held twice, in the worker and in the replica's process."""


class Replica:
    """Comes up with `start`, answers, and goes down with `stop` without losing a request."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        name: str = "replica",
        update: UpdateSettings | None = None,
        share_port: bool = False,
    ) -> None:
        return_freed_memory()
        self.config = config
        self.bundle = Bundle.load(config.bundle)
        self.quality = quality_table(self.bundle)
        self.host = Host(name, live=LiveSettings(0, config.scheduling))
        self.metrics = Metrics()
        self.share_port = share_port
        transport = Transport(max_message_bytes=config.max_message_mb << 20, share_port=share_port)
        self.server = Server(self.host, update or self._update_alone, transport)
        self.metrics_port = 0
        self._close_metrics: Callable[[], None] = lambda: None
        self._engine: ProcessEngine | None = None
        self._model: HostedModel | None = None

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def healthy(self) -> bool:
        """False while the worker is gone; callers then get ENGINE_RESTARTING or wait."""
        return self._engine is not None and self._engine.ready

    @property
    def alive(self) -> bool:
        """False if the dispatch loop has ended although it should not have."""
        return self._model is None or self.host.draining or self._model.scheduler.running

    async def start(self, advance: Advance = lambda done, total: None) -> None:
        """Listen, load, warm every stitch and batch size, then answer.

        Raises `OSError` if a port is taken and `EngineDied` if the worker cannot load the model.
        """
        await self.server.start(self.config.host, self.config.port)
        self.metrics_port, self._close_metrics = self.metrics.expose(
            self.config.metrics_port, self.config.host, share_port=self.share_port
        )
        worker = self._worker_config()
        self._engine = self._make_engine(worker)
        await self._engine.start()
        self._model = await self._host(self._engine, worker, advance)
        self.host.models[self._model.name] = self._model
        self.host.ready = True
        self._model.scheduler.metrics.ready.set(1)
        await self.server.set_serving(True)

    def apply(self, live: LiveSettings) -> None:
        """Schedule by these settings from the next batch on, unless newer ones are in force."""
        if live.revision >= self.host.live.revision:
            if self._model is not None:
                self._model.scheduler.configure(live.settings)
            self.host.live = live

    async def stop(self) -> None:
        """Readiness first, then no new work, then finish, then exit."""
        self.host.draining = True
        if self._model is not None:
            self._model.scheduler.metrics.ready.set(0)
        await self.server.set_serving(False)
        if self._model is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._model.scheduler.drain(), self.config.drain_s)
            await self._model.scheduler.close()
        await asyncio.sleep(LAME_DUCK_S)
        await self.server.stop(grace_s=1.0)
        if self._engine is not None:
            self._engine.close()
        self._close_metrics()

    def _make_engine(self, worker: WorkerConfig) -> ProcessEngine:
        light = worker.device == "cpu" and self.bundle.weight_bytes <= LIGHT_BYTES
        if light and self.config.inline_limit_ms > 0:
            return HybridEngine(worker, self.config.inline_limit_ms / 1e3)
        return ProcessEngine(worker)

    def _worker_config(self) -> WorkerConfig:
        manifest, inputs = self.bundle.manifest, self.bundle.manifest.preprocessing
        device = resolve_device(self.config.device)
        return WorkerConfig(
            bundle=str(self.bundle.path.resolve()),
            device=device,
            dtype=str(resolve_dtype(self.config.dtype, device)).removeprefix("torch."),
            threads=self.config.threads,
            max_rows=self.config.max_batch_rows,
            image_shape=(inputs.channels, inputs.height, inputs.width),
            classes=len(manifest.labels),
        )

    async def _host(
        self, engine: ProcessEngine, worker: WorkerConfig, advance: Advance
    ) -> HostedModel:
        stitches = {stitch.id: stitch for stitch in self.bundle.manifest.config.stitches()}
        profile = await warm_up(engine, self.bundle, worker, advance)
        name = self.bundle.manifest.name
        metrics: ModelMetrics = self.metrics.for_model(name, stitches)
        quality = {stitch: score.value for stitch, score in self.quality.stitches.items()}
        scheduler = Scheduler(engine, quality, profile, self.host.live.settings, metrics)
        try:
            scheduler.configure(self.host.live.settings)
        except BadInput as error:
            raise ConfigError(f"scheduling.{error}") from error
        reader = ImageReader(self.bundle.manifest.preprocessing)
        return HostedModel(self.bundle, scheduler, reader, stitches)

    async def _update_alone(self, changes: dict[str, Any]) -> LiveSettings:
        """The say of a replica that has no deployment around it."""
        live = merged(self.host.live, changes)
        self.apply(live)
        return live


def quality_table(bundle: Bundle) -> QualityTable:
    """Raises `BundleError` if the bundle is not calibrated, or not for every stitch."""
    if bundle.quality is None:
        raise BundleError(f"{bundle.path}: no quality.json; run `ladderstitch calibrate` first")
    stitches = {stitch.id for stitch in bundle.manifest.config.stitches()}
    if missing := stitches - bundle.quality.stitches.keys():
        raise BundleError(
            f"{bundle.path / 'quality.json'}: stitches {sorted(missing)} are not calibrated; "
            "run `ladderstitch calibrate` again"
        )
    return bundle.quality


def merged(live: LiveSettings, changes: dict[str, Any]) -> LiveSettings:
    """The settings after a change, checked anew, one revision later."""
    fields = live.settings.model_dump() | changes
    return LiveSettings(live.revision + 1, SchedulerSettings.model_validate(fields))


def port_is_free(address: str, port: int) -> bool:
    """Whether nobody listens there; gRPC itself would share a port with another process."""
    if port == 0:
        return True
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True

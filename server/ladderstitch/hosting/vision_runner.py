"""Runs a stitchable image classifier: worker, warm-up and scheduler of one bundle."""

from __future__ import annotations

import os
from typing import TextIO

from ladderstitch.config import ServerConfig
from ladderstitch.errors import BundleError, ConfigError, InvalidArgument
from ladderstitch.hosting.registry import ModelRegistry, ProgressCallback, VisionModel
from ladderstitch.runtime.device import resolve_device, resolve_dtype
from ladderstitch.scheduling.profiles import QualityTable
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.telemetry.metrics import Metrics, VisionMetrics
from ladderstitch.vision.bundle import Bundle
from ladderstitch.vision.engine.base import Engine, WorkerConfig
from ladderstitch.vision.engine.process import InlineEngine, ProcessEngine
from ladderstitch.vision.engine.warmup import warm_up
from ladderstitch.vision.preprocessing import ImageReader
from ladderstitch.vision.scheduler.scheduler import Scheduler

LIGHT_BYTES = 32 << 20
"""Bundles up to this size may be held twice, in the worker and in the replica's process."""


class VisionRunner:
    """A `Runner`."""

    def __init__(self, config: ServerConfig, registry: ModelRegistry, metrics: Metrics) -> None:
        """Raises `BundleError` for a bundle that is wrong or not calibrated."""
        self.config, self.registry, self.metrics = config, registry, metrics
        self.bundle = Bundle.load(config.bundle)
        self.quality = quality_table(self.bundle)
        self._engine: ProcessEngine | InlineEngine | None = None
        self._model: VisionModel | None = None
        self._record: TextIO | None = None

    @property
    def name(self) -> str:
        return self.bundle.manifest.name

    @property
    def healthy(self) -> bool:
        return self._engine is not None and self._engine.ready

    @property
    def alive(self) -> bool:
        return self._model is not None and self._model.scheduler.running

    async def start(self, advance: ProgressCallback) -> None:
        """Load, then warm every variant and batch size.

        Raises `EngineDied` if the worker cannot load the model, `ConfigError` for scheduling
        settings that do not fit it.
        """
        worker = self._worker_config()
        self._engine = self._make_engine(worker)
        await self._engine.start()
        self._model = await self._host(self._engine, worker, advance)
        self.registry.add(self._model)

    def set_ready(self, ready: bool) -> None:
        if self._model is not None:
            self._model.scheduler.metrics.ready.set(int(ready))

    def apply(self, settings: SchedulerSettings) -> None:
        if self._model is not None:
            self._model.scheduler.configure(settings)
            _tell_offer(self._model.scheduler)

    async def drain(self) -> None:
        if self._model is not None:
            await self._model.scheduler.drain()

    async def close(self) -> None:
        if self._model is not None:
            await self._model.scheduler.close()
        if self._engine is not None:
            self._engine.close()
        if self._record is not None:
            self._record.close()

    def _open_record(self) -> TextIO | None:
        """A file of this process and model, for what is planned; raises `ConfigError`."""
        folder = self.config.record
        if folder is None:
            return None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return (folder / f"{self.name}-{os.getpid()}.jsonl").open("w")
        except OSError as error:
            raise ConfigError(f"record: {error}") from error

    def _make_engine(self, worker: WorkerConfig) -> ProcessEngine | InlineEngine:
        light = worker.device == "cpu" and self.bundle.weight_bytes <= LIGHT_BYTES
        if light and self.config.inline_batch_limit_ms > 0:
            return InlineEngine(ProcessEngine(worker), self.config.inline_batch_limit_ms / 1e3)
        return ProcessEngine(worker)

    def _worker_config(self) -> WorkerConfig:
        manifest, inputs = self.bundle.manifest, self.bundle.manifest.preprocessing
        device = resolve_device(self.config.device)
        return WorkerConfig(
            bundle=str(self.bundle.path.resolve()),
            device=device,
            dtype=str(resolve_dtype(self.config.dtype, device)).removeprefix("torch."),
            threads=self.config.threads,
            max_batch_size=self.config.max_batch_size,
            image_shape=(inputs.channels, inputs.height, inputs.width),
            classes=len(manifest.labels),
        )

    async def _host(
        self, engine: Engine, worker: WorkerConfig, advance: ProgressCallback
    ) -> VisionModel:
        variants = {variant.id: variant for variant in self.bundle.manifest.config.stitches()}
        profile = await warm_up(engine, self.bundle, worker, advance)
        name = self.bundle.manifest.name
        metrics = VisionMetrics(self.metrics, name, variants)
        quality = {variant: score.value for variant, score in self.quality.variants.items()}
        settings = self.registry.active_settings.settings
        self._record = self._open_record()
        scheduler = Scheduler(engine, quality, profile, settings, metrics, record=self._record)
        try:
            scheduler.configure(settings)
        except InvalidArgument as error:
            raise ConfigError(f"scheduling.{error}") from error
        metrics.running.set_function(lambda: scheduler.running_requests)
        _tell_offer(scheduler)
        reader = ImageReader(self.bundle.manifest.preprocessing, self.config.max_image_pixels)
        return VisionModel(self.bundle, scheduler, reader, variants)


def _tell_offer(scheduler: Scheduler) -> None:
    candidates = scheduler.candidates
    fastest, best = (
        candidates.quality[variant] for variant in (candidates.frontier[0], candidates.best)
    )
    scheduler.metrics.offered(fastest, best, candidates.floor)


def quality_table(bundle: Bundle) -> QualityTable:
    """Raises `BundleError` if the bundle is not calibrated, or not for every variant."""
    if bundle.quality is None:
        raise BundleError(f"{bundle.path}: no quality.json; run `ladderstitch calibrate` first")
    variants = {s.id for s in bundle.manifest.config.stitches() if s.usable}
    if missing := variants - bundle.quality.variants.keys():
        raise BundleError(
            f"{bundle.path / 'quality.json'}: variants {sorted(missing)} are not calibrated; "
            "run `ladderstitch calibrate` again"
        )
    return bundle.quality

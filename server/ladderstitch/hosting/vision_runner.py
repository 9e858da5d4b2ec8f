"""The runner of an image classifier: an engine, its warm-up and the scheduler in front of it."""

from __future__ import annotations

import os
from typing import TextIO

from ladderstitch.config import ServerConfig
from ladderstitch.errors import BundleError, ConfigError, InvalidArgument
from ladderstitch.hosting.registry import ModelRegistry, ProgressCallback, VisionModel
from ladderstitch.runtime.device import resolve_device, resolve_dtype
from ladderstitch.scheduling.profiles import QualityTable
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.telemetry.model_metrics import VisionMetrics
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.engine.base import Engine, WorkerConfig
from ladderstitch.vision.engine.process import InlineEngine, ProcessEngine
from ladderstitch.vision.engine.warmup import warm_up
from ladderstitch.vision.preprocessing import ImageReader
from ladderstitch.vision.scheduler.scheduler import Scheduler

MAX_INLINE_BYTES = 32 << 20
"""Largest bundle that is held twice, in the worker and in the replica's process."""


class VisionRunner:
    """The `Runner` of one image classifier."""

    def __init__(self, config: ServerConfig, registry: ModelRegistry, metrics: Metrics) -> None:
        """Load the bundle's manifest and quality table.

        Raises `BundleError` if the bundle is invalid or not calibrated.
        """
        self.config, self.registry, self.metrics = config, registry, metrics
        self.bundle = VisionBundle.load(config.bundle)
        self.quality = quality_table(self.bundle)
        self._engine: ProcessEngine | InlineEngine | None = None
        self._model: VisionModel | None = None
        self._record: TextIO | None = None

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.bundle.manifest.name

    @property
    def healthy(self) -> bool:
        """Whether the worker is up."""
        return self._engine is not None and self._engine.ready

    @property
    def alive(self) -> bool:
        """Whether requests are answered, or will be once the worker has recovered."""
        return self._model is not None and self._model.scheduler.running

    async def start(self, on_progress: ProgressCallback) -> None:
        """Start the engine, warm it up and add the model to the registry.

        The warm-up runs every variant with every batch size. Raises `EngineDied` if the worker
        cannot load the model, and `ConfigError` if the scheduling settings do not fit it.
        """
        worker = self._worker_config()
        self._engine = self._make_engine(worker)
        await self._engine.start()
        self._model = await self._make_model(self._engine, worker, on_progress)
        self.registry.add(self._model)

    def set_ready(self, ready: bool) -> None:
        """Report in the metrics whether the model answers requests."""
        if self._model is not None:
            self._model.scheduler.metrics.ready.set(int(ready))

    def apply_settings(self, settings: SchedulerSettings) -> None:
        """Schedule by these settings from now on.

        Raises `InvalidArgument` if they do not fit the model.
        """
        if self._model is not None:
            self._model.scheduler.configure(settings)
            _report_quality_range(self._model.scheduler)

    async def drain(self) -> None:
        """Reject new requests, and return when all accepted ones have ended."""
        if self._model is not None:
            await self._model.scheduler.drain()

    async def close(self) -> None:
        """Stop the worker; requests that have not ended get an error."""
        if self._model is not None:
            await self._model.scheduler.close()
        if self._engine is not None:
            self._engine.close()
        if self._record is not None:
            self._record.close()

    def _open_record(self) -> TextIO | None:
        """Open the record of this process and model; return None if nothing is recorded.

        Raises `ConfigError` if the file cannot be written.
        """
        folder = self.config.record
        if folder is None:
            return None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return (folder / f"{self.name}-{os.getpid()}.jsonl").open("w")
        except OSError as error:
            raise ConfigError(f"record: {error}") from error

    def _make_engine(self, worker: WorkerConfig) -> ProcessEngine | InlineEngine:
        fits_twice = worker.device == "cpu" and self.bundle.weight_bytes <= MAX_INLINE_BYTES
        if fits_twice and self.config.inline_batch_limit_ms > 0:
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

    async def _make_model(
        self, engine: Engine, worker: WorkerConfig, on_progress: ProgressCallback
    ) -> VisionModel:
        variants = {variant.id: variant for variant in self.bundle.manifest.config.stitches()}
        profile = await warm_up(engine, self.bundle, worker, on_progress)
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
        metrics.running.set_function(lambda: len(scheduler.batch_runner.running))
        _report_quality_range(scheduler)
        reader = ImageReader(self.bundle.manifest.preprocessing, self.config.max_image_pixels)
        names = {variant: stitch.name for variant, stitch in variants.items()}
        return VisionModel(self.bundle, scheduler, reader, variants, names)


def _report_quality_range(scheduler: Scheduler) -> None:
    candidates = scheduler.planner.candidates
    fastest, best = (
        candidates.quality[variant] for variant in (candidates.frontier[0], candidates.best)
    )
    scheduler.metrics.set_quality_range(fastest, best, candidates.floor)


def quality_table(bundle: VisionBundle) -> QualityTable:
    """Return the quality of every variant.

    Raises `BundleError` if the bundle is not calibrated, or not for every variant.
    """
    if bundle.quality is None:
        raise BundleError(f"{bundle.path}: no quality.json; run `ladderstitch calibrate` first")
    variants = {s.id for s in bundle.manifest.config.stitches() if s.usable}
    if missing := variants - bundle.quality.variants.keys():
        raise BundleError(
            f"{bundle.path / 'quality.json'}: variants {sorted(missing)} are not calibrated; "
            "run `ladderstitch calibrate` again"
        )
    return bundle.quality

"""The runner of an image classifier: an engine, its warm-up and the scheduler in front of it."""

from __future__ import annotations

import logging
import os
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TextIO

from ladderstitch.config import ServerConfig
from ladderstitch.errors import BundleError, ConfigError, InvalidArgument
from ladderstitch.hosting.answer_limit import AnswerLimit
from ladderstitch.hosting.registry import ModelRegistry, Rehearse, VisionModel
from ladderstitch.runtime import ProgressCallback
from ladderstitch.runtime.cores import resolve_threads
from ladderstitch.scheduling.profiles import QualityTable
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.telemetry.model_metrics import VisionMetrics
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.engine.base import ContinuingEngine, Engine, EngineConfig
from ladderstitch.vision.engine.compiled import CompiledEngine
from ladderstitch.vision.engine.process import ProcessEngine
from ladderstitch.vision.engine.startup import (
    make_config,
    open_engine,
    prepare,
    served_variants,
)
from ladderstitch.vision.preprocessing import ImageReader
from ladderstitch.vision.scheduler.batch_runner import HangLimits
from ladderstitch.vision.scheduler.scheduler import Scheduler
from ladderstitch.vision.tensor_inputs import TensorReader

log = logging.getLogger(__name__)


class VisionRunner:
    """The `Runner` of one image classifier."""

    def __init__(self, config: ServerConfig, registry: ModelRegistry, metrics: Metrics) -> None:
        """Load the bundle's manifest and quality table.

        Raises `BundleError` if the bundle is invalid or not calibrated, or if its outputs exceed
        the largest message.
        """
        self.config, self.registry, self.metrics = config, registry, metrics
        self.bundle = VisionBundle.load(config.bundle)
        self._limit = AnswerLimit(config.max_message_mb)
        self._limit.check_bundle(self.bundle)
        self.quality = quality_table(self.bundle)
        self._engine: ProcessEngine | CompiledEngine | None = None
        self._model: VisionModel | None = None
        self._parts = AsyncExitStack()
        """What `close` closes, in reverse order."""

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

    async def start(self, on_progress: ProgressCallback, rehearse: Rehearse) -> None:
        """Start the engine, measure it, rehearse, and add the model to the registry.

        Raises `BundleError` or `EngineDied` if the weights cannot be loaded, and `ConfigError` if
        the scheduling settings do not fit the model.
        """
        config = make_config(
            self.bundle,
            runtime=self.config.runtime,
            device=self.config.device,
            dtype=self.config.dtype,
            threads=resolve_threads(self.config.threads, replicas=self.config.replicas),
            max_batch_size=self.config.max_batch_size,
        )
        self._engine = await open_engine(self.bundle, config, 0.0, on_progress)
        self._parts.push_async_callback(self._engine.stop)
        self._model = await self._make_model(self._engine, config, on_progress)
        scheduler, metrics = self._model.scheduler, self._model.scheduler.metrics
        metrics.running.set_function(lambda: len(scheduler.batch_runner.running))
        if isinstance(self._engine, CompiledEngine):  # measuring never holds the event loop
            self._engine.inline_limit_s = self.config.inline_batch_limit_ms / 1e3
        await self._rehearse(self._model, rehearse)
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
        """Stop the worker; requests that have not ended get an error.

        All parts are closed, also after a start that failed halfway.
        """
        await self._parts.aclose()

    def _open_record(self) -> TextIO | None:
        """Open the record of this process and model; return None if nothing is recorded.

        Raises `ConfigError` if the file cannot be written.
        """
        folder = self.config.record
        if folder is None:
            return None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            record = (folder / f"{self.name}-{os.getpid()}.jsonl").open("w")
        except OSError as error:
            raise ConfigError(f"record: {error}") from error
        self._parts.callback(_close_record, record)
        return record

    async def _make_model(
        self, engine: Engine, config: EngineConfig, on_progress: ProgressCallback
    ) -> VisionModel:
        variants = {variant.id: variant for variant in served_variants(self.bundle, config)}
        profile = await prepare(engine, self.bundle, self.quality, config, on_progress)
        name = self.bundle.manifest.name
        metrics = VisionMetrics(self.metrics, name, variants)
        quality = {
            variant: score.value
            for variant, score in self.quality.variants.items()
            if variant in variants
        }
        settings = self.registry.active_settings.settings
        record = self._open_record()
        limits = HangLimits() if isinstance(engine, CompiledEngine) else None
        continues = isinstance(engine, ContinuingEngine)
        served = [variant for variant in quality if variant in profile.variants]
        cascades = self.quality.cascade_set.restricted(served, continues=continues)
        if isinstance(engine, ContinuingEngine):
            await engine.join_cascades(cascades.pairs)
        scheduler = Scheduler(
            engine,
            quality,
            profile,
            settings,
            metrics,
            record=record,
            hang_limits=limits,
            cascades=cascades,
            agreements=self.quality.agreements,
        )
        self._parts.push_async_callback(scheduler.close)
        try:
            scheduler.configure(settings)
        except InvalidArgument as error:
            raise ConfigError(f"scheduling.{error}") from error
        _report_quality_range(scheduler)
        reader = self._make_reader()
        self._parts.callback(reader.close)
        names = {variant: stitch.name for variant, stitch in variants.items()}
        return VisionModel(self.bundle, scheduler, reader, variants, names, self._limit)

    def _make_reader(self) -> TensorReader:
        """Return the reader of the model's inputs."""
        manifest = self.bundle.manifest
        if not manifest.takes_images:
            return TensorReader(manifest.config.inputs.shape, self.config.non_finite_inputs)
        return ImageReader(
            manifest.preprocessing,
            self.config.max_image_pixels,
            max_bytes=self.config.max_image_mb << 20,
            decoders=self.config.image_decoders,
            decode_timeout_s=self.config.image_decode_timeout_s,
            non_finite=self.config.non_finite_inputs,
        )

    async def _rehearse(self, model: VisionModel, rehearse: Rehearse) -> None:
        """Let a twin of the model answer, whose requests no metrics and no record count."""
        metrics = VisionMetrics(Metrics(), self.name, model.variants)
        planner = model.scheduler.planner
        scheduler = Scheduler(
            model.scheduler.engine,
            planner.quality,
            planner.latency.profile,
            SchedulerSettings(),
            metrics,
        )
        try:
            await rehearse(replace(model, scheduler=scheduler))
        finally:
            await scheduler.close()


def _close_record(record: TextIO) -> None:
    """Close a record; a full disk does not keep a model from being closed."""
    try:
        record.close()
    except OSError as error:
        log.error("record %s is incomplete: %s", record.name, error)


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
    variants = {variant.id for variant in bundle.manifest.variants() if variant.usable}
    if missing := variants - bundle.quality.variants.keys():
        raise BundleError(
            f"{bundle.path / 'quality.json'}: variants {sorted(missing)} are not calibrated; "
            "run `ladderstitch calibrate` again"
        )
    return bundle.quality

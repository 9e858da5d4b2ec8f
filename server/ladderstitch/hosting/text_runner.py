"""The runner of a language model: a group of ranks and the scheduler in front of it."""

from __future__ import annotations

from dataclasses import replace

from ladderstitch.config import ServerConfig
from ladderstitch.errors import ConfigError, EngineRestarting, InvalidArgument
from ladderstitch.hosting.registry import ModelRegistry, Rehearse, TextModel
from ladderstitch.runtime import ProgressCallback
from ladderstitch.runtime.cores import resolve_threads
from ladderstitch.runtime.device import resolve_device, resolve_text_dtype
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.telemetry.text_metrics import TextMetrics
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.engine.rank_config import GroupOptions, RankConfig
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.engine.rank_handle import Launcher, RankLost
from ladderstitch.text.model.shard import Shard
from ladderstitch.text.scheduler.scheduler import TextScheduler


class TextRunner:
    """The `Runner` of one language model."""

    def __init__(
        self, config: ServerConfig, registry: ModelRegistry, metrics: Metrics, launcher: Launcher
    ) -> None:
        """Load the bundle's manifest and tokenizer; `launcher` starts the ranks.

        Raises `BundleError` if the bundle is invalid, and `ConfigError` if it lacks a path or
        cannot be split over `tensor_parallel_size` ranks.
        """
        self.config, self.registry = config, registry
        bundle = TextBundle.load(config.bundle)
        self.bundle = bundle.with_paths(config.paths) if config.paths else bundle
        self.tokenizer = self.bundle.tokenizer()
        for rank in range(config.tensor_parallel_size):
            Shard.of(self.bundle.manifest.config, rank, config.tensor_parallel_size)
        self.variant_names = [variant.name for variant in self.bundle.manifest.variants]
        self.chat_template = self.bundle.chat_template(self.tokenizer)
        self.metrics = TextMetrics(metrics, self.name, range(len(self.variant_names)))
        self._launcher = launcher
        self._group: RankGroup | None = None
        self._scheduler: TextScheduler | None = None

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.bundle.manifest.name

    @property
    def healthy(self) -> bool:
        """Whether all ranks are ready and react, and the scheduler runs."""
        if self._group is None or not self._group.responsive:
            return False
        return self._scheduler is None or self._scheduler.healthy

    @property
    def alive(self) -> bool:
        """Whether requests are answered, or will be once the ranks have recovered."""
        return self._scheduler is not None and self._scheduler.alive

    async def start(self, on_progress: ProgressCallback, rehearse: Rehearse) -> None:
        """Start the ranks, measure their steps, rehearse, and add the model to the registry.

        Raises `EngineRestarting`, with the reason, if the ranks do not start, and `ConfigError` if
        the scheduling settings do not fit the model.
        """
        self._group = self._make_group()
        await self._group.start()
        self._scheduler = self._make_scheduler(self._group, self.metrics)
        try:
            await self._scheduler.measure()
        except RankLost as error:
            raise EngineRestarting(f"a rank was lost while steps were measured: {error}") from error
        try:
            self.apply_settings(self.registry.active_settings.settings)
        except InvalidArgument as error:
            raise ConfigError(f"scheduling.{error}") from error
        most = self._scheduler.max_tokens - 1  # at least one token of an answer
        max_prompt_tokens = min(most, self.config.max_prompt_tokens or most)
        model = TextModel(
            self.bundle, self._scheduler, self.metrics, max_prompt_tokens, self.chat_template
        )
        await self._rehearse(model, self._group, rehearse)
        self.registry.add(model)
        on_progress(1, 1)

    def _make_scheduler(self, group: RankGroup, metrics: TextMetrics) -> TextScheduler:
        return TextScheduler(
            group,
            self.tokenizer,
            self.bundle.manifest.end_tokens,
            self.bundle.quality,
            self.variant_names,
            self.config.max_sequences,
            observer=metrics,
            switches=self.bundle.switches,
            by_name=self.bundle.manifest.adapters,
        )

    async def _rehearse(self, model: TextModel, group: RankGroup, rehearse: Rehearse) -> None:
        """Let a twin of the model answer, whose requests no metrics and no prefix cache see."""
        metrics = TextMetrics(Metrics(), self.name, range(len(self.variant_names)))
        scheduler = self._make_scheduler(group, metrics)
        scheduler.times = model.scheduler.times.copy()
        scheduler.apply_settings(SchedulerSettings())
        try:
            await rehearse(replace(model, scheduler=scheduler, metrics=metrics))
        finally:
            await scheduler.close()

    def set_ready(self, ready: bool) -> None:
        """Report in the metrics whether the model answers requests."""
        self.metrics.ready.set(int(ready))

    def apply_settings(self, settings: SchedulerSettings) -> None:
        """Schedule by these settings from now on.

        Raises `InvalidArgument` if they do not fit the model.
        """
        if self._scheduler is None:
            return
        self._scheduler.apply_settings(settings)
        candidates = self._scheduler.candidates
        fastest, best = candidates.for_quality()[0], candidates.for_quality()[-1]
        self.metrics.set_quality_range(
            candidates.quality[fastest], candidates.quality[best], candidates.floor
        )

    async def drain(self) -> None:
        """Reject new requests, and return when all accepted ones have ended."""
        if self._scheduler is not None:
            await self._scheduler.drain()

    async def close(self) -> None:
        """Stop the ranks; requests that have not ended get an error."""
        if self.chat_template is not None:
            self.chat_template.close()
        if self._scheduler is not None:
            await self._scheduler.close()
        if self._group is not None:
            await self._group.close()

    def _make_group(self) -> RankGroup:
        config = self.config
        device = resolve_device(config.device)
        max_model_len = min(config.max_model_len, self.bundle.manifest.config.max_positions)
        max_batched_tokens = min(max_model_len, config.max_batched_tokens)
        rank_config = RankConfig.of(
            self.bundle,
            ranks=config.tensor_parallel_size,
            dtype=str(resolve_text_dtype(config.dtype, device)).removeprefix("torch."),
            device=device,
            threads=resolve_threads(
                config.threads,
                ranks=config.tensor_parallel_size,
                replicas=config.replicas,
                reserve_core=True,
            ),
            max_model_len=max_model_len,
            kv_cache_tokens=max(config.kv_cache_tokens, max_batched_tokens),
            max_batched_tokens=max_batched_tokens,
        )
        secret_file = config.rank_secret_file  # with it, ranks are started by hand
        options = GroupOptions(
            link="tcp" if config.link == "auto" and config.rank_address else config.link,
            latency_s=config.emulated_link_ms / 1e3,
            spares=config.spare_ranks,
            listen=config.rank_address,
            secret=secret_file.read_text().strip() if secret_file else "",
        )
        launcher = None if secret_file else self._launcher
        return RankGroup(rank_config, options, launcher, self.metrics.restarts.inc)

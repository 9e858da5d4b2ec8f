"""Runs a language model: a group of ranks and the generator that answers with it."""

from __future__ import annotations

from ladderstitch.config import ServerConfig
from ladderstitch.errors import EngineRestarting
from ladderstitch.hosting.registry import ModelRegistry, ProgressCallback, TextModel
from ladderstitch.runtime.device import resolve_device, resolve_dtype
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.telemetry.text_metrics import TextMetrics
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.engine.rank_config import GroupOptions, RankConfig
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.engine.rank_handle import Launcher, RankLost
from ladderstitch.text.model.weights import Shard
from ladderstitch.text.scheduler.scheduler import TextScheduler


class TextRunner:
    """A `Runner`."""

    def __init__(
        self, config: ServerConfig, registry: ModelRegistry, metrics: Metrics, launcher: Launcher
    ) -> None:
        """Raises `BundleError` for a wrong bundle, `ConfigError` for ranks that do not fit it."""
        self.config, self.registry = config, registry
        self.bundle = TextBundle.load(config.bundle)
        self.tokenizer = self.bundle.tokenizer()
        for rank in range(config.tensor_parallel_size):
            Shard.of(self.bundle.manifest.config, rank, config.tensor_parallel_size)
        self.path_names = [path.name for path in self.bundle.manifest.ways]
        self.metrics = TextMetrics(metrics, self.bundle.manifest.name, range(len(self.path_names)))
        self._launcher = launcher
        self._group: RankGroup | None = None
        self._scheduler: TextScheduler | None = None

    @property
    def name(self) -> str:
        return self.bundle.manifest.name

    @property
    def healthy(self) -> bool:
        return self._group is not None and self._group.whole

    @property
    def alive(self) -> bool:
        return self._group is not None and not self._group.given_up

    async def start(self, advance: ProgressCallback) -> None:
        """Bring up the ranks; raises `EngineRestarting` with the reason if they do not come."""
        config, manifest = self.config, self.bundle.manifest
        device = resolve_device(config.device)
        context = min(config.max_model_len, manifest.config.max_positions)
        job = RankConfig.of(
            self.bundle,
            ranks=config.tensor_parallel_size,
            dtype=str(resolve_dtype(config.dtype, device)).removeprefix("torch."),
            device=device,
            threads=config.threads,
            max_model_len=context,
            kv_cache_tokens=max(config.kv_cache_tokens, min(context, config.max_batched_tokens)),
            max_batched_tokens=min(context, config.max_batched_tokens),
        )
        by_hand = config.rank_secret_file
        options = GroupOptions(
            link="tcp" if config.link == "auto" and config.rank_address else config.link,
            latency_s=config.emulated_link_ms / 1e3,
            spares=config.spare_ranks,
            listen=config.rank_address,
            secret=by_hand.read_text().strip() if by_hand else "",
        )
        launcher = None if by_hand else self._launcher
        self._group = RankGroup(job, options, launcher, self.metrics.restarts.inc)
        await self._group.start()
        self._scheduler = TextScheduler(
            self._group,
            self.tokenizer,
            manifest.end_tokens,
            self.bundle.quality,
            self.path_names,
            config.max_sequences,
            observer=self.metrics,
        )
        try:
            await self._scheduler.measure()
        except RankLost as error:
            raise EngineRestarting(f"a rank was lost while steps were measured: {error}") from error
        self.apply(config.scheduling)
        self.registry.add(
            TextModel(self.bundle, self._scheduler, self.metrics, self._max_prompt_tokens())
        )
        advance(1, 1)

    def _max_prompt_tokens(self) -> int:
        """A prompt leaves room for at least one token of an answer."""
        assert self._scheduler is not None, "set by `start`"
        most = self._scheduler.max_tokens - 1
        return min(most, self.config.max_prompt_tokens or most)

    def set_ready(self, ready: bool) -> None:
        self.metrics.ready.set(int(ready))

    def apply(self, settings: SchedulerSettings) -> None:
        if self._scheduler is None:
            return
        self._scheduler.apply(settings)
        candidates = self._scheduler.candidates
        fastest, best = candidates.for_quality()[0], candidates.for_quality()[-1]
        self.metrics.offered(
            candidates.quality[fastest], candidates.quality[best], candidates.floor
        )

    async def drain(self) -> None:
        if self._scheduler is not None:
            await self._scheduler.drain()

    async def close(self) -> None:
        if self._scheduler is not None:
            await self._scheduler.close()
        if self._group is not None:
            await self._group.close()

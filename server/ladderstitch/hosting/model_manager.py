"""Loading, replacing and unloading of a replica's models while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable

from ladderstitch.bundles import find_bundle, is_language_bundle
from ladderstitch.config import ServerConfig
from ladderstitch.errors import Draining, InvalidArgument, ModelNotFound, UserError
from ladderstitch.hosting.registry import LoadedModel, ModelRegistry, Runner
from ladderstitch.hosting.text_runner import TextRunner
from ladderstitch.hosting.vision_runner import VisionRunner
from ladderstitch.runtime import ProgressCallback
from ladderstitch.scheduling.settings import ActiveSettings
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.text.engine.rank_handle import Launcher
from ladderstitch.vision.engine.base import EngineDied

log = logging.getLogger(__name__)

BUNDLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Names of bundles that may be loaded: none of them is a path."""

RETIRE_DELAY_S = 0.25
"""Delay before an old model drains: a request that found it may still be decoding its image."""

MakeRunner = Callable[[ServerConfig], Runner]
"""Raises `UserError` if the bundle cannot be served."""


class ModelManager:
    """The runners of a replica by the names of their models; one change runs at a time."""

    def __init__(
        self, config: ServerConfig, registry: ModelRegistry, first: Runner, make: MakeRunner
    ) -> None:
        """`first` runs the configured model; `make` makes the runners of models loaded later."""
        self.config, self.registry, self.make = config, registry, make
        self.runners: dict[str, Runner] = {first.name: first}
        self._lock = asyncio.Lock()

    @property
    def healthy(self) -> bool:
        """Whether every worker and rank of every model is up."""
        return all(runner.healthy for runner in self.runners.values())

    @property
    def alive(self) -> bool:
        """Whether every model answers requests, or will once its engine has recovered."""
        return all(runner.alive for runner in self.runners.values())

    async def start(self, on_progress: ProgressCallback) -> None:
        """Start the configured model; raises what its runner raises."""
        for runner in self.runners.values():
            await runner.start(on_progress)

    async def load(self, bundle: str) -> LoadedModel:
        """Load a bundle and return its model, which replaces a model of the same name.

        Raises `InvalidArgument` if the bundle does not exist or cannot be served, and `Draining`
        if the replica is draining.
        """
        async with self._lock:
            if self.registry.draining:
                raise Draining("the replica is draining; load models on another one")
            runner = await self._start_runner(bundle)
            old = self.runners.get(runner.name)
            self.runners[runner.name] = runner
            runner.set_ready(True)
            if old is not None:
                await self._retire(old)
            log.info("loaded model=%s", runner.name)
            return self.registry.models_by_name[runner.name]

    async def unload(self, name: str) -> None:
        """Remove a model, and return when the requests it accepted have ended.

        Raises `ModelNotFound` if the replica has no model of that name.
        """
        async with self._lock:
            if name not in self.runners:
                known = ", ".join(map(repr, self.runners)) or "none"
                raise ModelNotFound(f"model_name: no model {name[:80]!r}; this server has {known}")
            self.registry.remove(name)
            runner = self.runners.pop(name)
            runner.set_ready(False)
            await self._retire(runner)
            log.info("unloaded model=%s", name)

    def set_ready(self, ready: bool) -> None:
        """Report in the metrics whether the models answer requests."""
        for runner in self.runners.values():
            runner.set_ready(ready)

    def apply_settings(self, active: ActiveSettings) -> None:
        """Apply settings to every model that they fit; others keep theirs.

        A pin, for example, names a variant that only some models have.
        """
        for runner in self.runners.values():
            try:
                runner.apply_settings(active.settings)
            except InvalidArgument as error:
                log.warning("scheduling settings kept, model=%s: %s", runner.name, error)

    async def drain(self) -> None:
        """Reject new requests, and return when all accepted ones have ended."""
        await asyncio.gather(*(runner.drain() for runner in self.runners.values()))

    async def close(self) -> None:
        """Stop all engines; requests that have not ended get an error."""
        for runner in self.runners.values():
            await runner.close()

    async def _start_runner(self, bundle: str) -> Runner:
        if not BUNDLE_NAME.fullmatch(bundle):
            raise InvalidArgument(
                "bundle", f"expected the name of a fetched model, got {bundle[:80]!r}"
            )
        try:
            config = self.config.model_copy(update={"bundle": find_bundle(bundle)})
            runner = self.make(config)
            try:
                await runner.start(lambda done, total: None)
            except BaseException:
                await runner.close()  # also after a cancelled call: workers and ranks must end
                raise
        except (UserError, EngineDied) as error:
            raise InvalidArgument("bundle", str(error)) from error
        return runner

    async def _retire(self, runner: Runner) -> None:
        """Drain a runner that was replaced or removed, for at most `drain_s`, and close it."""
        await asyncio.sleep(RETIRE_DELAY_S)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(runner.drain(), self.config.drain_s)
        await runner.close()


def make_runner(
    config: ServerConfig, registry: ModelRegistry, metrics: Metrics, launcher: Launcher
) -> Runner:
    """Return a runner for the kind of the configured bundle; it is not started yet.

    Raises `BundleError` if the bundle cannot be served.
    """
    if is_language_bundle(config.bundle):
        return TextRunner(config, registry, metrics, launcher)
    return VisionRunner(config, registry, metrics)

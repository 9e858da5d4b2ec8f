"""The models of a replica while it runs: loaded beside each other, replaced, taken away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable

from ladderstitch.bundles import find_bundle, is_language_bundle
from ladderstitch.config import ServerConfig
from ladderstitch.errors import Draining, InvalidArgument, ModelNotFound, UserError
from ladderstitch.hosting.registry import LoadedModel, ModelRegistry, ProgressCallback, Runner
from ladderstitch.hosting.text_runner import TextRunner
from ladderstitch.hosting.vision_runner import VisionRunner
from ladderstitch.scheduling.settings import ActiveSettings
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.text.engine.rank_handle import Launcher
from ladderstitch.vision.engine.base import EngineDied

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Of a bundle: nothing that could be a path."""

GRACE_S = 0.25
"""So long, a request that has found the old model may still be decoding its picture."""

MakeRunner = Callable[[ServerConfig], Runner]
"""Raises `UserError` for a bundle that cannot be served."""


class ModelManager:
    """The runners by their models' names; one change at a time."""

    def __init__(
        self, config: ServerConfig, registry: ModelRegistry, first: Runner, make: MakeRunner
    ) -> None:
        """`first` is the model that the replica was configured with."""
        self.config, self.registry, self.make = config, registry, make
        self.runners: dict[str, Runner] = {first.name: first}
        self._turn = asyncio.Lock()

    @property
    def healthy(self) -> bool:
        return all(runner.healthy for runner in self.runners.values())

    @property
    def alive(self) -> bool:
        return all(runner.alive for runner in self.runners.values())

    async def start(self, advance: ProgressCallback) -> None:
        """Bring up the configured model; raises what its runner raises."""
        for runner in self.runners.values():
            await runner.start(advance)

    async def load(self, bundle: str) -> LoadedModel:
        """Serve a bundle, in place of the model of its name if there is one.

        Raises `InvalidArgument` if there is no such bundle or it cannot be served, `Draining`.
        """
        async with self._turn:
            if self.registry.draining:
                raise Draining("the replica is draining; load models on another one")
            runner = await self._started(bundle)
            old = self.runners.get(runner.name)
            self.runners[runner.name] = runner
            runner.set_ready(True)
            if old is not None:
                await self._end(old)
            log.info("model %s loaded", runner.name)
            return self.registry.models_by_name[runner.name]

    async def unload(self, name: str) -> None:
        """Take a model away when what it accepted has ended; raises `ModelNotFound`."""
        async with self._turn:
            if name not in self.runners:
                known = ", ".join(map(repr, self.runners)) or "none"
                raise ModelNotFound(f"model_name: no model {name[:80]!r}; this server has {known}")
            self.registry.remove(name)
            runner = self.runners.pop(name)
            runner.set_ready(False)
            await self._end(runner)
            log.info("model %s unloaded", name)

    def set_ready(self, ready: bool) -> None:
        for runner in self.runners.values():
            runner.set_ready(ready)

    def apply(self, live: ActiveSettings) -> None:
        """Schedule by these, wherever they fit: a pin names a variant of one model."""
        for runner in self.runners.values():
            try:
                runner.apply(live.settings)
            except InvalidArgument as error:
                log.warning("model %s keeps its scheduling: %s", runner.name, error)

    async def drain(self) -> None:
        await asyncio.gather(*(runner.drain() for runner in self.runners.values()))

    async def close(self) -> None:
        for runner in self.runners.values():
            await runner.close()

    async def _started(self, bundle: str) -> Runner:
        if not NAME.fullmatch(bundle):
            raise InvalidArgument(
                "bundle", f"expected the name of a fetched model, got {bundle[:80]!r}"
            )
        runner: Runner | None = None
        try:
            config = self.config.model_copy(update={"bundle": find_bundle(bundle)})
            runner = self.make(config)
            await runner.start(lambda done, total: None)
        except (UserError, EngineDied) as error:
            if runner is not None:
                await runner.close()
            raise InvalidArgument("bundle", str(error)) from error
        return runner

    async def _end(self, runner: Runner) -> None:
        await asyncio.sleep(GRACE_S)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(runner.drain(), self.config.drain_s)
        await runner.close()


def make_runner(
    config: ServerConfig, registry: ModelRegistry, metrics: Metrics, launcher: Launcher
) -> Runner:
    """The runner for the bundle's family. Raises `BundleError` if it cannot be served."""
    if is_language_bundle(config.bundle):
        return TextRunner(config, registry, metrics, launcher)
    return VisionRunner(config, registry, metrics)

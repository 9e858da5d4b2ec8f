"""Loading, replacing and unloading of a replica's models while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from ladderstitch.bundles import find_bundle, is_language_bundle
from ladderstitch.config import ServerConfig
from ladderstitch.errors import Draining, InvalidArgument, ModelNotFound, UserError
from ladderstitch.hosting.registry import LoadedModel, ModelRegistry, Rehearse, Runner
from ladderstitch.hosting.text_runner import TextRunner
from ladderstitch.hosting.vision_runner import VisionRunner
from ladderstitch.runtime import ProgressCallback
from ladderstitch.runtime.process import trim_heap
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
    """The runners of a replica by the names of their models; one change runs at a time.

    A caller may give up at any time: a load that has not finished then ends, with its processes,
    and an unload goes on.
    """

    def __init__(
        self,
        config: ServerConfig,
        registry: ModelRegistry,
        first: Runner,
        make: MakeRunner,
        announce: Callable[[str], Awaitable[None]],
        rehearse: Rehearse,
        forget: Callable[[str], None] = lambda name: None,
    ) -> None:
        """`first` runs the configured model; `make` makes the runners of models loaded later.

        `make` is called in a thread. `announce` is called with the name of a model that is about to
        be unloaded, `rehearse` with the twin of one that is about to be used, and `forget` with the
        name of a model that no runner has any more.
        """
        self.config, self.registry, self.make = config, registry, make
        self.runners: dict[str, Runner] = {first.name: first}
        self._announce, self._rehearse, self._forget = announce, rehearse, forget
        self._lock = asyncio.Lock()
        self._ending: set[asyncio.Task[Any]] = set()

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
            await runner.start(on_progress, self._rehearse)

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
                await self._finish(self._retire(old))
            log.info("loaded model=%s", runner.name)
            return self.registry.models_by_name[runner.name]

    async def unload(self, name: str) -> None:
        """Remove a model, and return when the requests it accepted have ended.

        Raises `ModelNotFound` if the replica has no model of that name.
        """
        await self._finish(self._unload(name))

    async def _unload(self, name: str) -> None:
        async with self._lock:
            if name not in self.runners:
                known = ", ".join(map(repr, self.runners)) or "none"
                raise ModelNotFound(f"model_name: no model {name[:80]!r}; this server has {known}")
            await self._announce(name)
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
        closing = [runner.close() for runner in self.runners.values()]
        for error in await asyncio.gather(*closing, *self._ending, return_exceptions=True):
            if isinstance(error, Exception):
                log.error("a model could not be closed", exc_info=error)

    async def _start_runner(self, bundle: str) -> Runner:
        """Return a started runner; its processes end if the caller gives up before."""
        if not BUNDLE_NAME.fullmatch(bundle):
            raise InvalidArgument(
                "bundle", f"expected the name of a fetched model, got {bundle[:80]!r}"
            )
        making = asyncio.create_task(asyncio.to_thread(self._make, bundle), name="check-bundle")
        try:
            runner = await asyncio.shield(making)
            await runner.start(lambda done, total: None, self._rehearse)
        except (UserError, EngineDied) as error:
            await self._finish(self._discard(making))
            raise InvalidArgument("bundle", str(error)) from error
        except BaseException:
            await self._finish(self._discard(making))
            raise
        return runner

    def _make(self, bundle: str) -> Runner:
        """Return a runner that is not started; checking a bundle takes up to seconds."""
        path = find_bundle(bundle, paths=False)
        return self.make(self.config.model_copy(update={"bundle": path}))

    async def _discard(self, making: asyncio.Task[Runner]) -> None:
        """Close a runner that is not used, once it is made."""
        with contextlib.suppress(UserError):
            await self._close(await making)

    async def _retire(self, runner: Runner) -> None:
        """Drain a runner that was replaced or removed, for at most `drain_s`, and close it."""
        await asyncio.sleep(RETIRE_DELAY_S)
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(runner.drain(), self.config.drain_s)
        finally:
            await self._close(runner)

    async def _close(self, runner: Runner) -> None:
        """Close a runner, and forget its model unless another runner has it."""
        try:
            await runner.close()
        finally:
            if runner.name not in self.runners:
                self._forget(runner.name)
            await asyncio.to_thread(trim_heap)

    async def _finish(self, ending: Coroutine[Any, Any, None]) -> None:
        """Await what must be finished, which goes on if the caller gives up meanwhile."""
        task = asyncio.create_task(ending, name="end-model")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        await asyncio.shield(task)


def make_runner(
    config: ServerConfig, registry: ModelRegistry, metrics: Metrics, launcher: Launcher
) -> Runner:
    """Return a runner for the kind of the configured bundle; it is not started yet.

    Raises `BundleError` if the bundle cannot be served.
    """
    if is_language_bundle(config.bundle):
        return TextRunner(config, registry, metrics, launcher)
    return VisionRunner(config, registry, metrics)

"""The ranks of one model as one device: it runs forward passes and recovers when a rank dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from ladderstitch.errors import EngineRestarting
from ladderstitch.text.engine.members import Members
from ladderstitch.text.engine.passes import Passes
from ladderstitch.text.engine.rank_config import (
    CreateCommSpec,
    GroupOptions,
    RankConfig,
    create_comm_spec,
)
from ladderstitch.text.engine.rank_handle import (
    Launcher,
    RankFailed,
    RankHandle,
    RankLost,
    launch_process,
)
from ladderstitch.text.engine.rank_pool import RankPool, RankStartError
from ladderstitch.text.engine.recovery import Recovery
from ladderstitch.text.messages import (
    Kind,
    Logits,
    LogitsMode,
    Message,
    Step,
    StepOutput,
    Tokens,
    dense_step,
)

log = logging.getLogger(__name__)

RECOVERY_TIMEOUT_S = 90.0
"""Seconds that `wait_ready` waits for a recovery."""


class RankGroup:
    """R ranks that compute forward passes together.

    A pass that loses a rank raises `RankLost`. `wait_ready` then waits until all ranks are back.
    Their caches are empty, so the caller has to compute all earlier tokens again.

    A rank that does not reply within the limits of `GroupOptions.liveness` is killed and replaced.
    Ranks are replaced however often that fails; `ready` is false meanwhile.
    """

    def __init__(
        self,
        rank_config: RankConfig,
        options: GroupOptions | None = None,
        launcher: Launcher | None = launch_process,
        on_restart: Callable[[], None] = lambda: None,
    ) -> None:
        self.rank_config, options = rank_config, options or GroupOptions()
        self.restarts = 0
        self._on_restart = on_restart
        self._rank_pool = RankPool(launcher, self._on_loss, options.listen, options.secret)
        self._members = Members(rank_config, options, self._rank_pool)
        self._all_ready = asyncio.Event()
        self._recovery = Recovery(self._recover, self._needs_recovery)
        self._idle_checks: asyncio.Task[None] | None = None
        self._started = self._closing = False
        self._passes = Passes(self._members, self._begin_recovery, self._replace_comm)

    @property
    def options(self) -> GroupOptions:
        """The options of the group and of its communicator."""
        return self._members.options

    @property
    def loaded(self) -> dict[int, dict[str, Any]]:
        """What each rank said of its shard when it had loaded it."""
        return self._members.loaded

    @property
    def ready(self) -> bool:
        """Whether all ranks are loaded and connected."""
        return self._all_ready.is_set()

    @property
    def responsive(self) -> bool:
        """Whether all ranks are ready and none is much later with its reply than planned."""
        return self.ready and not self._passes.slow

    @property
    def address(self) -> str:
        """The address at which ranks connect: `unix:PATH` or `HOST:PORT`."""
        return self._rank_pool.address

    @property
    def secret(self) -> str:
        """The secret that ranks must know."""
        return self._rank_pool.secret

    @property
    def pids(self) -> list[int]:
        """The process ids of the live ranks, in the order of the ranks."""
        return self._members.pids

    async def start(self) -> None:
        """Start the ranks and wait until they are ready.

        Raises `EngineRestarting` with the reason if a rank cannot start or load its shard, and
        `ConfigError` if there is no room for shared memory.
        """
        await self._rank_pool.start()
        try:
            for _ in range(self.rank_config.ranks + self.options.spares):
                await self._rank_pool.launch()
            await self._members.fill()
        except (RankLost, RankFailed, RankStartError, OSError) as error:
            raise EngineRestarting(f"the ranks did not start: {error}") from error
        self._started = True
        self._all_ready.set()
        self._idle_checks = asyncio.create_task(self._check_while_idle(), name="check-ranks")

    async def wait_ready(self) -> None:
        """Wait until all ranks are ready; raises `EngineRestarting` after `RECOVERY_TIMEOUT_S`."""
        try:
            await asyncio.wait_for(self._all_ready.wait(), RECOVERY_TIMEOUT_S)
        except TimeoutError:
            raise EngineRestarting(
                f"the ranks did not recover within {RECOVERY_TIMEOUT_S:.0f} s"
            ) from None

    async def forward(
        self, tokens: Tokens, start: int, path: int = 0, *, last_only: bool = True
    ) -> Logits:
        """Return the logits of tokens [B, T] at positions from `start` on.

        They are [B, V] of the last tokens, or [B, T, V] of all if not `last_only`. Sequence b uses
        the b-th part of the cache. Raises what `run` raises.
        """
        mode = LogitsMode.LAST if last_only else LogitsMode.ALL
        step = dense_step(tokens, start, path, self.rank_config.sequence_blocks, mode)
        output = await self.run(step)
        vocabulary = output.logits.shape[-1]
        shape = tokens.shape[:1] if last_only else tokens.shape
        return output.logits.reshape(*shape, vocabulary)

    async def run(self, step: Step) -> StepOutput:
        """Run one forward pass on all ranks and return its output.

        Raises `RankLost` if a rank died (the caches are then lost) and `InternalError` if the pass
        failed on a rank. A cancelled caller does not interrupt the pass.
        """
        message = Message(Kind.FORWARD, *step.pack())
        parts = await self._passes.run(message, step.planned_s, lambda: self.ready)
        return StepOutput.merge([(part.header, part.body) for part in parts])

    async def _replace_comm(self) -> None:
        """Connect the ranks again after a failed pass; start a recovery if that is impossible."""
        if not self.ready:
            return  # a recovery has begun, and connects them
        try:
            if self._members.survive_rank_loss:
                await self._members.connect()
                return
        except Exception as error:
            log.error("no new communicator after a failed pass: %s", error)
        await self._members.drop_all()
        self._begin_recovery()

    async def _check_while_idle(self) -> None:
        """Ask idle ranks for a sign of life at intervals, so that one that hangs is noticed."""
        while True:
            await asyncio.sleep(self.options.liveness.idle_check_s)
            if not self.ready or self._passes.lock.locked():
                continue
            try:
                await self.check()
            except Exception as error:
                log.warning("check of idle ranks failed: %s: %s", type(error).__name__, error)

    async def check(self) -> None:
        """Wait until all ranks reply to a message; raises `RankLost` if one does not."""
        await self._passes.run(Message(Kind.PING), 0.0, lambda: True)

    async def change_comm(
        self, options: GroupOptions, create_spec: CreateCommSpec = create_comm_spec
    ) -> None:
        """Replace the communicator and keep the caches; raises `RankLost` if a rank died."""
        async with self._passes.lock:
            self._members.options, self._members.create_spec = options, create_spec
            await self._members.connect()

    async def close(self) -> None:
        """End all ranks and remove the shared memory."""
        self._closing = True
        await self._recovery.stop()
        if self._idle_checks is not None:
            self._idle_checks.cancel()
            await asyncio.gather(self._idle_checks, return_exceptions=True)
        await self._members.close()
        await self._rank_pool.close()
        self._members.unlink_region()

    def _on_loss(self, lost: RankHandle) -> None:
        if self._closing:
            return
        number = self._members.mark_lost(lost)
        if number is not None:
            log.error("rank %d (pid %d) died; recovering", number, lost.pid)
            self._begin_recovery()
        else:
            self._recovery.start()

    def _begin_recovery(self) -> None:
        """Admit no pass, abort the running one, and replace what is lost or does not react."""
        if self._closing or not self._started:
            return
        self._all_ready.clear()
        self._members.abort()
        self._recovery.start()

    def _needs_recovery(self) -> bool:
        return self._started and not self._closing and (not self.ready or self._lacks_spares)

    async def _recover(self) -> None:
        """Replace the lost ranks, or start a spare if none is lost."""
        if not self.ready:
            await self._replace_lost()
        else:
            await self._rank_pool.launch()

    @property
    def _lacks_spares(self) -> bool:
        pool = self._rank_pool
        return pool.can_launch and pool.available < self.options.spares

    async def _replace_lost(self) -> None:
        await self._release_survivors()
        num_missing = self._members.num_missing
        await self._members.fill()
        self._all_ready.set()
        log.warning("all ranks ready")
        if num_missing:
            self.restarts += 1
            self._on_restart()

    async def _release_survivors(self) -> None:
        """Wait until the running pass has ended; end the ranks that do not abort it in time."""
        abort_s = self.options.liveness.abort_s if self._members.is_abortable else 0.0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(abort_s), self._passes.lock:
                pass
        await self._members.drop_unusable(abort_s)

"""The ranks of one model as one device: it runs forward passes and recovers when a rank dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from ladderstitch.errors import EngineRestarting
from ladderstitch.text.engine.rank_config import (
    Assignment,
    CommInit,
    CommRegion,
    CreateCommSpec,
    GroupOptions,
    RankConfig,
    create_comm_spec,
    survives_rank_loss,
)
from ladderstitch.text.engine.rank_handle import (
    Launcher,
    RankFailed,
    RankHandle,
    RankLost,
    launch_process,
    raise_first_error,
    raise_pass_error,
    request_all,
)
from ladderstitch.text.engine.rank_pool import RankPool, RankStartError
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

ABORT_TIMEOUT_S = 10.0
"""Seconds that a surviving rank has to abort its all-reduce before it is restarted."""

RECOVERY_ATTEMPTS = 5


class RankGroup:
    """R ranks that compute forward passes together.

    A pass that loses a rank raises `RankLost`. `wait_ready` then waits until all ranks are back.
    Their caches are empty, so the caller has to compute all earlier tokens again.
    """

    def __init__(
        self,
        rank_config: RankConfig,
        options: GroupOptions | None = None,
        launcher: Launcher | None = launch_process,
        on_restart: Callable[[], None] = lambda: None,
    ) -> None:
        self.rank_config, self.options = rank_config, options or GroupOptions()
        self.loaded: dict[int, dict[str, Any]] = {}
        self.restarts = 0
        self.failed = False
        self._on_restart = on_restart
        self._rank_pool = RankPool(
            launcher, self._on_loss, self.options.listen, self.options.secret
        )
        self._ranks: list[RankHandle | None] = [None] * rank_config.ranks
        self._region: CommRegion | None = None
        self._all_ready = asyncio.Event()
        self._recovery: asyncio.Task[None] | None = None
        self._closing = False
        self._pass_lock = asyncio.Lock()
        self._create_spec: CreateCommSpec = create_comm_spec

    @property
    def ready(self) -> bool:
        """Whether all ranks are loaded and connected."""
        return self._all_ready.is_set()

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
        return [rank.pid for rank in self._ranks if rank is not None]

    async def start(self) -> None:
        """Start the ranks and wait until they are ready.

        Raises `EngineRestarting` with the reason if a rank cannot start or load its shard.
        """
        await self._rank_pool.start()
        for _ in range(self.rank_config.ranks + self.options.spares):
            await self._rank_pool.launch()
        try:
            await self._fill_group()
        except (RankLost, RankFailed, RankStartError) as error:
            raise EngineRestarting(f"the ranks did not start: {error}") from error
        self._all_ready.set()

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
        await self._pass_lock.acquire()
        try:
            if not self.ready:
                raise RankLost("the group is recovering")
            # The ranks start before other tasks of this process run, such as writing tokens.
            replies = request_all(self._live_ranks(), message)
        except BaseException:
            self._pass_lock.release()
            raise
        running = asyncio.create_task(self._finish_pass(replies))
        running.add_done_callback(_retrieve_exception)
        return await asyncio.shield(running)  # the ranks' replies must be read in any case

    async def _finish_pass(self, replies: Awaitable[list[Message | BaseException]]) -> StepOutput:
        try:
            parts = raise_pass_error(await replies)
        finally:
            self._pass_lock.release()
        return StepOutput.merge([(part.header, part.body) for part in parts])

    async def change_comm(
        self, options: GroupOptions, create_spec: CreateCommSpec = create_comm_spec
    ) -> None:
        """Replace the communicator and keep the caches; raises `RankLost` if a rank died."""
        async with self._pass_lock:
            self.options, self._create_spec = options, create_spec
            await self._init_comm()

    async def close(self) -> None:
        """End all ranks and remove the shared memory."""
        self._closing = True
        if self._recovery is not None:
            self._recovery.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._recovery
        for rank in self._ranks:
            if rank is not None:
                await rank.close()
        await self._rank_pool.close()
        if self._region is not None:
            self._region.unlink()

    def _on_loss(self, lost: RankHandle) -> None:
        if self._closing:
            return
        if lost in self._ranks:
            self._all_ready.clear()
            number = self._ranks.index(lost)
            self._ranks[number] = None
            log.error("rank %d (pid %d) died; recovering", number, lost.pid)
            if self._region is not None:
                self._region.abort()
        if self._recovery is None or self._recovery.done():
            self._recovery = asyncio.create_task(self._recover(), name="recover-ranks")

    async def _recover(self) -> None:
        """Replace the lost ranks, then the spares; stop after `RECOVERY_ATTEMPTS`."""
        for attempt in range(RECOVERY_ATTEMPTS):
            if self.ready:
                break
            try:
                await self._release_survivors()
                await self._fill_group()
            except (RankLost, RankFailed, RankStartError) as error:
                log.error("recovery attempt %d failed: %s", attempt + 1, error)
                await asyncio.sleep(min(0.1 * 2**attempt, 2.0))
                continue
            self.restarts += 1
            self._on_restart()
            self._all_ready.set()
            log.warning("all ranks ready")
        if not self.ready:
            self.failed = True
            log.error("recovery stopped after %d attempts", RECOVERY_ATTEMPTS)
            return
        while self._rank_pool.available < self.options.spares:
            await self._rank_pool.launch()

    async def _release_survivors(self) -> None:
        """Wait until the running pass has ended; drop the ranks that do not abort it in time.

        If the communicator does not survive the loss of a rank, drop all ranks.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ABORT_TIMEOUT_S), self._pass_lock:
                pass
        keep = survives_rank_loss(self.rank_config, self.options)
        for number, rank in enumerate(self._ranks):
            if rank is None:
                continue
            if rank.busy:
                log.error(
                    "rank %d did not abort its all-reduce within %.0f s; restarting it",
                    number,
                    ABORT_TIMEOUT_S,
                )
            if rank.busy or not keep:
                self._ranks[number] = None
                await rank.close()

    async def _fill_group(self) -> None:
        """Acquire the missing ranks and load their shards, then connect all ranks."""
        missing = [number for number, rank in enumerate(self._ranks) if rank is None]
        for number in missing:
            self._ranks[number] = await self._rank_pool.acquire()
        replies = await asyncio.gather(
            *(self._load_model(number) for number in missing), return_exceptions=True
        )
        loaded = raise_first_error(replies)
        for number, message in zip(missing, loaded, strict=True):
            self.loaded[number] = message.header
            log.info(
                "rank loaded rank=%d seconds=%.1f weight_mb=%.0f memory_mb=%.0f %s",
                number,
                message.header["seconds"],
                message.header["weight_bytes"] / 1e6,
                message.header["memory_bytes"] / 1e6,
                "; ".join(message.header["notes"]),
            )
        await self._init_comm()

    async def _init_comm(self) -> None:
        ranks = self._live_ranks()
        addresses = [rank.comm_address for rank in ranks]
        spec, self._region = self._create_spec(self.rank_config, self.options, addresses)
        message = Message(Kind.INIT_COMM, CommInit(spec=spec).model_dump(mode="json"))
        try:
            raise_first_error(await request_all(ranks, message))
        finally:
            if self._region is not None:
                self._region.unlink()

    def _live_ranks(self) -> list[RankHandle]:
        live = [rank for rank in self._ranks if rank is not None]
        if len(live) < self.rank_config.ranks:
            raise RankLost("a rank died while the group was starting")
        return live

    async def _load_model(self, number: int) -> Message:
        rank = self._ranks[number]
        if rank is None:
            raise RankLost(f"rank {number} died before it could load its shard")
        assignment = Assignment(rank_config=self.rank_config, rank=number)
        return await rank.request(Message(Kind.LOAD_MODEL, assignment.model_dump(mode="json")))


def _retrieve_exception(done: asyncio.Task[StepOutput]) -> None:
    """Read the exception, so that asyncio does not log it when the caller has disconnected."""
    if not done.cancelled():
        done.exception()

"""The ranks of one model as one device: it runs forward passes and recovers when a rank dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from ladderstitch.errors import EngineRestarting, InternalError
from ladderstitch.text.engine.liveness import (
    CONNECT_GPU_LIMIT_S,
    CONNECT_LIMIT_S,
    LOAD_LIMIT_S,
    wait_until_done,
)
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
        self.rank_config, self.options = rank_config, options or GroupOptions()
        self.loaded: dict[int, dict[str, Any]] = {}
        self.restarts = 0
        self._on_restart = on_restart
        self._rank_pool = RankPool(
            launcher, self._on_loss, self.options.listen, self.options.secret
        )
        self._ranks: list[RankHandle | None] = [None] * rank_config.ranks
        self._region: CommRegion | None = None
        self._all_ready = asyncio.Event()
        self._recovery = Recovery(self._recover, self._needs_recovery)
        self._idle_checks: asyncio.Task[None] | None = None
        self._started = self._closing = self._slow = False
        self._pass_lock = asyncio.Lock()
        self._create_spec: CreateCommSpec = create_comm_spec

    @property
    def ready(self) -> bool:
        """Whether all ranks are loaded and connected."""
        return self._all_ready.is_set()

    @property
    def responsive(self) -> bool:
        """Whether all ranks are ready and none is much later with its reply than planned."""
        return self.ready and not self._slow

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

        Raises `EngineRestarting` with the reason if a rank cannot start or load its shard, and
        `ConfigError` if there is no room for shared memory.
        """
        await self._rank_pool.start()
        try:
            for _ in range(self.rank_config.ranks + self.options.spares):
                await self._rank_pool.launch()
            await self._fill_group()
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
        await self._pass_lock.acquire()
        try:
            if not self.ready:
                raise RankLost("the group is recovering")
            # The ranks start before other tasks of this process run, such as writing tokens.
            replies = request_all(self._live_ranks(), message)
        except BaseException:
            self._pass_lock.release()
            raise
        running = asyncio.create_task(self._finish_pass(replies, step.planned_s))
        running.add_done_callback(_retrieve_exception)
        parts = await asyncio.shield(running)  # the ranks' replies must be read in any case
        return StepOutput.merge([(part.header, part.body) for part in parts])

    async def _finish_pass(
        self, replies: Awaitable[list[Message | BaseException]], planned_s: float | None
    ) -> list[Message]:
        """Return the ranks' replies; start a recovery if one of them does not reply or is lost.

        After a pass that failed on a rank, the ranks are at different reductions. They get a new
        communicator before the next pass, which must not read partials of this one.
        """
        try:
            answered = await self._await_replies(asyncio.ensure_future(replies), planned_s)
            return raise_pass_error(answered)
        except RankLost:
            self._begin_recovery()
            raise
        except InternalError:
            if self.rank_config.ranks > 1:
                await self._replace_comm()
            raise
        finally:
            self._pass_lock.release()

    async def _await_replies(
        self, replies: asyncio.Future[list[Message | BaseException]], planned_s: float | None
    ) -> list[Message | BaseException]:
        liveness, device = self.options.liveness, self.rank_config.device
        limit_s = liveness.limit_s(planned_s, device)
        slow_after_s = liveness.slow_after_s(planned_s, device)
        try:
            if not await wait_until_done(replies, slow_after_s, limit_s, self._report_slow):
                log.error(
                    "no reply of all ranks within limit_s=%.1f; replacing the others", limit_s
                )
                self._begin_recovery()  # which ends the ranks that do not abort the pass
            return await replies
        finally:
            self._slow = False

    def _report_slow(self) -> None:
        self._slow = True

    async def _replace_comm(self) -> None:
        """Connect the ranks again after a failed pass; start a recovery if that is impossible."""
        if not self.ready:
            return  # a recovery has begun, and connects them
        try:
            if survives_rank_loss(self.rank_config, self.options):
                await self._init_comm()
                return
        except Exception as error:
            log.error("no new communicator after a failed pass: %s", error)
        for number in range(len(self._ranks)):
            await self._drop(number)
        self._begin_recovery()

    async def _check_while_idle(self) -> None:
        """Ask idle ranks for a sign of life at intervals, so that one that hangs is noticed."""
        while True:
            await asyncio.sleep(self.options.liveness.idle_check_s)
            if not self.ready or self._pass_lock.locked():
                continue
            try:
                await self.check()
            except Exception as error:
                log.warning("check of idle ranks failed: %s: %s", type(error).__name__, error)

    async def check(self) -> None:
        """Wait until all ranks reply to a message; raises `RankLost` if one does not."""
        await self._pass_lock.acquire()
        try:
            replies = request_all(self._live_ranks(), Message(Kind.PING))
        except BaseException:
            self._pass_lock.release()
            raise
        checking = asyncio.create_task(self._finish_pass(replies, 0.0))
        checking.add_done_callback(_retrieve_exception)
        await asyncio.shield(checking)

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
        await self._recovery.stop()
        if self._idle_checks is not None:
            self._idle_checks.cancel()
            await asyncio.gather(self._idle_checks, return_exceptions=True)
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
            number = self._ranks.index(lost)
            self._ranks[number] = None
            log.error("rank %d (pid %d) died; recovering", number, lost.pid)
            self._begin_recovery()
        else:
            self._recovery.start()

    def _begin_recovery(self) -> None:
        """Admit no pass, abort the running one, and replace what is lost or does not react."""
        if self._closing or not self._started:
            return
        self._all_ready.clear()
        if self._region is not None:
            self._region.abort()
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
        num_missing = self._ranks.count(None)
        await self._fill_group()
        self._all_ready.set()
        log.warning("all ranks ready")
        if num_missing:
            self.restarts += 1
            self._on_restart()

    async def _release_survivors(self) -> None:
        """Wait until the running pass has ended; drop the ranks that do not abort it in time.

        If the communicator does not survive the loss of a rank, drop all ranks.
        """
        is_abortable = self._region is not None or None in self._ranks
        abort_s = self.options.liveness.abort_s if is_abortable else 0.0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(abort_s), self._pass_lock:
                pass
        keep = survives_rank_loss(self.rank_config, self.options)
        for number, rank in enumerate(self._ranks):
            if rank is None:
                continue
            if rank.busy:
                log.error("rank %d does not react; killing it after_s=%.1f", number, abort_s)
            if rank.busy or rank.lost or not rank.has_model or not keep:
                self._ranks[number] = None
                await rank.close()

    async def _fill_group(self) -> None:
        """Acquire the missing ranks and load their shards, then connect all ranks."""
        missing = [number for number, rank in enumerate(self._ranks) if rank is None]
        for number in missing:
            self._ranks[number] = await self._acquire()
        replies = await asyncio.gather(
            *(self._load_model(number) for number in missing), return_exceptions=True
        )
        for number, reply in zip(missing, replies, strict=True):
            if isinstance(reply, BaseException):  # this rank has no model: try with another one
                await self._drop(number)
        loaded = raise_first_error(replies)
        for number, message in zip(missing, loaded, strict=True):
            if (rank := self._ranks[number]) is not None:
                rank.has_model = True
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

    async def _acquire(self) -> RankHandle:
        """Return an idle rank that reacts; spares may have been stopped while they waited."""
        for _ in range(self.options.spares + 1):
            rank = await self._rank_pool.acquire()
            if await self._check_idle(rank):
                return rank
            log.error("spare rank (pid %d) does not react; it was killed", rank.pid)
        raise RankStartError("no rank that was started reacts")

    async def _check_idle(self, rank: RankHandle) -> bool:
        """Return whether a rank reacts; close it if not, or if the caller gives up meanwhile."""
        reply = asyncio.ensure_future(rank.request(Message(Kind.PING)))
        limit_s = self.options.liveness.limit_s(0.0, self.rank_config.device)
        reacts = False
        try:
            answered = await wait_until_done(reply, limit_s, limit_s)
            reacts = answered and reply.exception() is None
        finally:
            if not reacts:
                await rank.close()
                await asyncio.gather(reply, return_exceptions=True)
        return reacts

    async def _drop(self, number: int) -> None:
        rank, self._ranks[number] = self._ranks[number], None
        if rank is not None:
            await rank.close()

    async def _init_comm(self) -> None:
        ranks = self._live_ranks()
        addresses = [rank.comm_address for rank in ranks]
        spec, self._region = self._create_spec(self.rank_config, self.options, addresses)
        message = Message(Kind.INIT_COMM, CommInit(spec=spec).model_dump(mode="json"))
        replies = asyncio.ensure_future(request_all(ranks, message))
        limit_s = CONNECT_LIMIT_S if self.rank_config.device == "cpu" else CONNECT_GPU_LIMIT_S
        try:
            if not await wait_until_done(replies, limit_s, limit_s):
                for number, rank in enumerate(ranks):
                    if rank.busy:
                        log.error("rank %d did not connect; killing it", number)
                        await self._drop(number)
            raise_first_error(await replies)
            self._live_ranks()  # one may have died since it replied
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
        message = Message(Kind.LOAD_MODEL, assignment.model_dump(mode="json"))
        reply = asyncio.ensure_future(rank.request(message))
        if not await wait_until_done(reply, LOAD_LIMIT_S, LOAD_LIMIT_S):
            await rank.close()
        return await reply


def _retrieve_exception(done: asyncio.Task[list[Message]]) -> None:
    """Read the exception, so that asyncio does not log it when the caller has disconnected."""
    if not done.cancelled():
        done.exception()

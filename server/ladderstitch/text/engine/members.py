"""The ranks of one group: each with its shard, all connected by one communicator."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

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
    RankHandle,
    RankLost,
    raise_first_error,
    request_all,
)
from ladderstitch.text.engine.rank_pool import RankPool, RankStartError
from ladderstitch.text.messages import Kind, Message

log = logging.getLogger(__name__)


class Members:
    """The R ranks of a group, some of which may be missing.

    `loaded` has what each rank said of its shard when it had loaded it.
    """

    def __init__(self, rank_config: RankConfig, options: GroupOptions, pool: RankPool) -> None:
        self.rank_config, self.options = rank_config, options
        self.create_spec: CreateCommSpec = create_comm_spec
        self.loaded: dict[int, dict[str, Any]] = {}
        self._pool = pool
        self._ranks: list[RankHandle | None] = [None] * rank_config.ranks
        self._region: CommRegion | None = None

    @property
    def pids(self) -> list[int]:
        """The process ids of the live ranks, in the order of the ranks."""
        return [rank.pid for rank in self._ranks if rank is not None]

    @property
    def num_missing(self) -> int:
        """The number of ranks that are lost or have not been acquired."""
        return self._ranks.count(None)

    @property
    def survive_rank_loss(self) -> bool:
        """Whether the other ranks can go on with a new one after the loss of a rank."""
        return survives_rank_loss(self.rank_config, self.options)

    @property
    def is_abortable(self) -> bool:
        """Whether a running pass ends early when a rank is lost or `abort` is called."""
        return self._region is not None or self.num_missing > 0

    def live(self) -> list[RankHandle]:
        """Return all ranks; raises `RankLost` if one is missing."""
        live = [rank for rank in self._ranks if rank is not None]
        if len(live) < self.rank_config.ranks:
            raise RankLost("a rank died while the group was starting")
        return live

    def mark_lost(self, lost: RankHandle) -> int | None:
        """Return the number of a rank that died, which is missing from now on; None: no member."""
        if lost not in self._ranks:
            return None
        number = self._ranks.index(lost)
        self._ranks[number] = None
        return number

    async def fill(self) -> None:
        """Acquire the missing ranks and load their shards, then connect all ranks.

        Raises `RankStartError`, `RankLost` or `RankFailed` if a rank cannot be started, dies, or
        cannot load its shard.
        """
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
            self._report_loaded(number, message.header)
        await self.connect()

    def _report_loaded(self, number: int, stats: dict[str, Any]) -> None:
        self.loaded[number] = stats
        log.info(
            "rank loaded rank=%d seconds=%.1f weight_mb=%.0f memory_mb=%.0f %s",
            number,
            stats["seconds"],
            stats["weight_bytes"] / 1e6,
            stats["memory_bytes"] / 1e6,
            "; ".join(stats["notes"]),
        )

    async def connect(self) -> None:
        """Give all ranks a new communicator; raises `RankLost` if one is missing or dies."""
        ranks = self.live()
        addresses = [rank.comm_address for rank in ranks]
        spec, self._region = self.create_spec(self.rank_config, self.options, addresses)
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
            self.live()  # one may have died since it replied
        finally:
            self.unlink_region()

    def abort(self) -> None:
        """Abort the running pass of ranks that share memory."""
        if self._region is not None:
            self._region.abort()

    def unlink_region(self) -> None:
        """Remove the name of the shared memory; ranks that have opened it keep it."""
        if self._region is not None:
            self._region.unlink()

    async def drop_unusable(self, abort_s: float) -> None:
        """End the ranks that do not react `abort_s` after a loss, or that cannot go on without it.

        If the communicator does not survive the loss of a rank, these are all.
        """
        keep = self.survive_rank_loss
        for number, rank in enumerate(self._ranks):
            if rank is None:
                continue
            if rank.busy:
                log.error("rank %d does not react; killing it after_s=%.1f", number, abort_s)
            if rank.busy or rank.lost or not rank.has_model or not keep:
                self._ranks[number] = None
                await rank.close()

    async def drop_all(self) -> None:
        """End all ranks, which are missing from now on."""
        for number in range(len(self._ranks)):
            await self._drop(number)

    async def close(self) -> None:
        """End all ranks."""
        for rank in self._ranks:
            if rank is not None:
                await rank.close()

    async def _acquire(self) -> RankHandle:
        """Return an idle rank that reacts; spares may have been stopped while they waited."""
        for _ in range(self.options.spares + 1):
            rank = await self._pool.acquire()
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

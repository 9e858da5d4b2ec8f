"""The ranks of one model as one device: runs forward passes, and mends itself when a rank dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from ladderstitch.errors import EngineRestarting, InternalError
from ladderstitch.text.engine.rank_config import (
    Assignment,
    CommInit,
    CommRegion,
    CreateCommSpec,
    GroupOptions,
    RankConfig,
    create_comm_spec,
    mendable,
)
from ladderstitch.text.engine.rank_handle import (
    Launcher,
    RankFailed,
    RankHandle,
    RankLost,
    launch_process,
)
from ladderstitch.text.engine.rank_pool import RankPool, RankStartError
from ladderstitch.text.engine.wire import Kind, Message
from ladderstitch.text.step import Logits, LogitsMode, Step, StepOutput, Tokens, aligned

log = logging.getLogger(__name__)

RECOVERY_S = 90.0
"""So long a call waits for the group to be whole again."""

LET_GO_S = 10.0
"""So long a survivor may take to notice that its peer is gone."""

ATTEMPTS = 5


class RankGroup:
    """R ranks. A call that loses a rank raises `RankLost`; then `ready` waits for the new group,
    whose caches are empty: whoever had tokens in them feeds these again.
    """

    def __init__(
        self,
        job: RankConfig,
        options: GroupOptions | None = None,
        launcher: Launcher | None = launch_process,
        on_restart: Callable[[], None] = lambda: None,
    ) -> None:
        self.job, self.options = job, options or GroupOptions()
        self.loaded: dict[int, dict[str, Any]] = {}
        self.restarts = 0
        self._on_restart = on_restart
        self.given_up = False
        self._recruiter = RankPool(
            launcher, self._on_loss, self.options.listen, self.options.secret
        )
        self._members: list[RankHandle | None] = [None] * job.ranks
        self._region: CommRegion | None = None
        self._whole = asyncio.Event()
        self._mending: asyncio.Task[None] | None = None
        self._closing = False
        self._turn = asyncio.Lock()
        self._arrange: CreateCommSpec = create_comm_spec

    @property
    def whole(self) -> bool:
        return self._whole.is_set()

    @property
    def address(self) -> str:
        """Where ranks connect."""
        return self._recruiter.address

    @property
    def secret(self) -> str:
        return self._recruiter.secret

    @property
    def pids(self) -> list[int]:
        return [member.pid for member in self._members if member is not None]

    async def start(self) -> None:
        """Start the ranks and load their shares. Raises `EngineRestarting` with the reason if they
        cannot be brought up."""
        await self._recruiter.start()
        for _ in range(self.job.ranks + self.options.spares):
            await self._recruiter.launch()
        try:
            await self._assemble()
        except (RankLost, RankFailed, RankStartError) as error:
            raise EngineRestarting(f"the ranks did not come up: {error}") from error
        self._whole.set()

    async def ready(self) -> None:
        """Wait until all ranks are there; raises `EngineRestarting` if that takes too long."""
        try:
            await asyncio.wait_for(self._whole.wait(), RECOVERY_S)
        except TimeoutError:
            raise EngineRestarting(f"the ranks were not back after {RECOVERY_S:.0f} s") from None

    async def forward(
        self, tokens: Tokens, start: int, path: int = 0, *, last_only: bool = True
    ) -> Logits:
        """Logits [B, V] of the last tokens, or [B, T, V], of tokens [B, T] at positions start.. .

        Sequence b has the b-th part of the cache. Raises as `run`.
        """
        want = LogitsMode.LAST if last_only else LogitsMode.ALL
        outcome = await self.run(aligned(tokens, start, path, self.job.sequence_blocks, want))
        vocabulary = outcome.logits.shape[-1]
        shape = tokens.shape[:1] if last_only else tokens.shape
        return outcome.logits.reshape(*shape, vocabulary)

    async def run(self, step: Step) -> StepOutput:
        """One forward pass of all ranks.

        Raises `RankLost` if a rank died (the caches are gone), `InternalError` if the pass failed.
        """
        message = Message(Kind.FORWARD, *step.pack())
        running = asyncio.create_task(self._pass(message))
        running.add_done_callback(_retrieve)
        return await asyncio.shield(running)  # ranks finish what a cancelled caller began

    async def _pass(self, message: Message) -> StepOutput:
        async with self._turn:
            if not self._whole.is_set():
                raise RankLost("the group is not whole")
            replies = await self._ask_all(self._present(), message)
        return _merge(_passed(replies))

    @staticmethod
    async def _ask_all(
        members: list[RankHandle], message: Message
    ) -> list[Message | BaseException]:
        return await asyncio.gather(*(m.ask(message) for m in members), return_exceptions=True)

    async def change_link(
        self, options: GroupOptions, arrange: CreateCommSpec = create_comm_spec
    ) -> None:
        """Reach each other in another way from now on; the caches are kept. Raises `RankLost`."""
        async with self._turn:
            self.options, self._arrange = options, arrange
            await self._join()

    async def close(self) -> None:
        """End all ranks."""
        self._closing = True
        if self._mending is not None:
            self._mending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._mending
        for member in self._members:
            if member is not None:
                await member.close()
        await self._recruiter.close()
        if self._region is not None:
            self._region.forget()

    def _on_loss(self, member: RankHandle) -> None:
        if self._closing:
            return
        if member in self._members:
            self._whole.clear()
            rank = self._members.index(member)
            self._members[rank] = None
            log.error("rank %d (process %d) is gone; mending the group", rank, member.pid)
            if self._region is not None:
                self._region.abort()
        if self._mending is None or self._mending.done():
            self._mending = asyncio.create_task(self._mend(), name="mend-ranks")

    async def _mend(self) -> None:
        """Make the group whole again, then its spares; tries for as long as callers wait."""
        for attempt in range(ATTEMPTS):
            if self._whole.is_set():
                break
            try:
                await self._release_survivors()
                await self._assemble()
            except (RankLost, RankFailed, RankStartError) as error:
                log.error("mending, attempt %d: %s", attempt + 1, error)
                await asyncio.sleep(min(0.1 * 2**attempt, 2.0))
                continue
            self.restarts += 1
            self._on_restart()
            self._whole.set()
            log.warning("the group is whole again")
        if not self._whole.is_set():
            self.given_up = True
            log.error("giving up on the group after %d attempts", ATTEMPTS)
            return
        while self._recruiter.available < self.options.spares:
            await self._recruiter.launch()

    async def _release_survivors(self) -> None:
        """Wait until those in mid-step have noticed; replace those that do not."""
        try:
            async with asyncio.timeout(LET_GO_S), self._turn:
                pass
        except TimeoutError:
            log.error("a survivor is stuck in the link; replacing it")
        kept = mendable(self.job, self.options)
        for rank, member in enumerate(self._members):
            if member is not None and (member.busy or not kept):
                self._members[rank] = None
                await member.close()

    async def _assemble(self) -> None:
        """Fill the empty places, then join all ranks by a new link."""
        empty = [rank for rank, member in enumerate(self._members) if member is None]
        for rank in empty:
            self._members[rank] = await self._recruiter.take()
        replies = await asyncio.gather(
            *(self._assign(rank) for rank in empty), return_exceptions=True
        )
        self.loaded |= {r: m.header for r, m in zip(empty, _good(replies), strict=True)}
        await self._join()

    async def _join(self) -> None:
        members = self._present()
        spec, self._region = self._arrange(self.job, self.options, [m.listens for m in members])
        joining = Message(Kind.JOIN, CommInit(link=spec).model_dump(mode="json"))
        try:
            _good(await self._ask_all(members, joining))
        finally:
            if self._region is not None:
                self._region.forget()

    def _present(self) -> list[RankHandle]:
        present = [member for member in self._members if member is not None]
        if len(present) < self.job.ranks:
            raise RankLost("a rank died while the group was being made")
        return present

    async def _assign(self, rank: int) -> Message:
        member = self._members[rank]
        if member is None:
            raise RankLost(f"rank {rank} died before it was assigned")
        fields = Assignment(job=self.job, rank=rank).model_dump(mode="json")
        return await member.ask(Message(Kind.ASSIGN, fields))


def _retrieve(done: asyncio.Task[StepOutput]) -> None:
    """Look at the outcome, so that asyncio does not report it when the caller is gone."""
    if not done.cancelled():
        done.exception()


def _good(replies: list[Message | BaseException]) -> list[Message]:
    """All replies, or the first error among them."""
    for reply in replies:
        if isinstance(reply, BaseException):
            raise reply
    return [reply for reply in replies if isinstance(reply, Message)]


def _passed(replies: list[Message | BaseException]) -> list[Message]:
    """Every rank's part; a lost rank explains the failures of the others."""
    for reply in replies:
        if isinstance(reply, BaseException) and not isinstance(reply, RankFailed):
            raise reply
    for reply in replies:
        if isinstance(reply, RankFailed):
            if reply.peer_lost:
                raise RankLost(str(reply))
            raise InternalError(f"the forward pass failed: {reply}")
    return _good(replies)


def _merge(parts: list[Message]) -> StepOutput:
    """Each rank has its rows of the vocabulary, in order of the ranks."""
    tokens = np.array([part.header["tokens"] for part in parts], np.int64)
    best = np.array([part.header["best"] for part in parts], np.float32).argmax(axis=0)
    logits = [np.frombuffer(part.body, np.float32).reshape(part.header["shape"]) for part in parts]
    return StepOutput(tokens[best, np.arange(tokens.shape[1])], np.concatenate(logits, axis=-1))

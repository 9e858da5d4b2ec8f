"""One call to one replica, handed on to the caller: messages, metadata, and how it ended."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import grpc

from ladderstitch.api.deadlines import HELD_KEY, METADATA_KEY
from ladderstitch.api.status import Context
from ladderstitch.errors import NotReady
from ladderstitch.gateway.replica_connection import ReplicaConnection
from ladderstitch.gateway.replica_pool import ReplicaPool

SICKNESS = frozenset({"UNAVAILABLE", "INTERNAL", "UNKNOWN"})


class UpstreamFailure(Exception):
    """A replica's call ended with a status; `begun`: the caller has got something of it."""

    def __init__(
        self,
        code: grpc.StatusCode,
        details: str,
        begun: bool,
        initial: Metadata = (),
        trailing: Metadata = (),
    ) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code, self.details, self.begun = code, details, begun
        self.initial, self.trailing = initial, trailing

    @property
    def sick(self) -> bool:
        """Whether it speaks against the replica, not against the request."""
        return self.code.name in SICKNESS

    async def tell(self, context: Context) -> None:
        """End the caller's call in the same way."""
        if self.initial and not self.begun:
            await context.send_initial_metadata(self.initial)
        await context.abort(self.code, self.details, self.trailing)


async def ask(
    link: ReplicaConnection,
    method: str,
    request: bytes,
    context: Context,
    attempts: RequestAttempts,
) -> bytes:
    """One message for one; raises `UpstreamFailure`."""
    call = link.stub("unary_unary", method)(
        request, timeout=attempts.timeout_s, metadata=attempts.metadata
    )
    with _under_way(link, call, attempts):
        reply: bytes = await asyncio.shield(call)
        await _open(call, context)
        await _close(call, context)
    return reply


async def ask_stream(
    link: ReplicaConnection,
    method: str,
    request: bytes,
    context: Context,
    attempts: RequestAttempts,
) -> None:
    """Messages for one; raises `UpstreamFailure`."""
    call = link.stub("unary_stream", method)(
        request, timeout=attempts.timeout_s, metadata=attempts.metadata
    )
    with _under_way(link, call, attempts) as progress:
        await _hand_on(call, context, progress)


async def converse(
    link: ReplicaConnection, method: str, requests: Any, context: Context, attempts: RequestAttempts
) -> None:
    """Messages both ways; raises `UpstreamFailure`, begun: what the caller sent is gone."""
    call = link.stub("stream_stream", method)(
        timeout=attempts.timeout_s, metadata=attempts.metadata
    )

    async def send() -> None:
        async for request in requests:
            await call.write(request)
        await call.done_writing()

    with _under_way(link, call, attempts, begun=True) as progress:
        sending = asyncio.create_task(send())
        try:
            await _hand_on(call, context, progress)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


@dataclass(slots=True)
class _Progress:
    begun: bool


@contextmanager
def _under_way(
    link: ReplicaConnection, call: Any, attempts: RequestAttempts, *, begun: bool = False
) -> Iterator[_Progress]:
    """While the call lasts; whatever ends it but the caller's own leaving becomes a `UpstreamFailure`."""
    progress = _Progress(begun)
    mark = link.opened(call, attempts.due)
    try:
        yield progress
    except grpc.aio.AioRpcError as error:
        raise UpstreamFailure(
            error.code(),
            error.details() or "",
            progress.begun,
            tuple(error.initial_metadata() or ()),
            tuple(error.trailing_metadata() or ()),
        ) from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # the caller left
            raise
        unavailable = grpc.StatusCode.UNAVAILABLE
        raise UpstreamFailure(unavailable, "the replica was lost", progress.begun) from None
    finally:
        _leave(call)
        link.ended(call, mark)


def _leave(call: Any) -> None:
    """Cancel in gRPC's core only, which then ends what waits for the call's next event.

    `call.cancel` drops that, and with it 80 bytes for each of up to six operations (grpc/grpc issue
    43360): 500 bytes a caller that leaves. For the same reason `shield` stands before what is
    awaited of a call. Where a later gRPC hides its core otherwise, `cancel` has to do.
    """
    core = getattr(call, "_cython_call", None)
    if core is None:
        call.cancel()
    elif not core.done():
        core.cancel("the caller left")


async def _hand_on(call: Any, context: Context, progress: _Progress) -> None:
    first = True
    while (message := await asyncio.shield(call.read())) is not grpc.aio.EOF:
        if first:
            await _open(call, context)
            first, progress.begun = False, True
        await context.write(message)
    await _close(call, context)


async def _open(call: Any, context: Context) -> None:
    if metadata := await call.initial_metadata():
        await context.send_initial_metadata(tuple(metadata))


async def _close(call: Any, context: Context) -> None:
    if metadata := await call.trailing_metadata():
        context.set_trailing_metadata(tuple(metadata))


Metadata = tuple[tuple[str, str | bytes], ...]

BACK_OFF_S, MAX_BACK_OFF_S = 0.02, 0.5
"""Before all replicas are tried anew; doubled each time, and spread by half to either side."""
NOTED_S = 0.001
"""What a call waits here beyond this, the replica is told."""
OURS = frozenset({"user-agent", HELD_KEY})
"""Metadata of one hop, which is not the next one's."""
_random = Random()


class RequestAttempts:
    """From the arrival of a request until it is answered, or nobody is left to ask in time."""

    def __init__(
        self,
        fleet: ReplicaPool,
        remaining_s: float | None,
        metadata: Iterable[tuple[str, str | bytes]],
        retry_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`remaining_s` is what the caller's deadline leaves, None without one."""
        self._fleet, self._clock = fleet, clock
        self.arrival = clock()
        self.deadline = math.inf if remaining_s is None else self.arrival + remaining_s
        self._give_up = min(self.deadline, self.arrival + retry_timeout_s)
        self._metadata: Metadata = tuple((k, v) for k, v in metadata if k not in OURS)
        self.due = min(self.arrival + _budget_s(self._metadata), self.deadline)
        self._tried: list[ReplicaConnection] = []
        self._pause_s = BACK_OFF_S
        self.count = 0

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self.arrival

    @property
    def timeout_s(self) -> float | None:
        """What is left for the next attempt."""
        return None if self.deadline == math.inf else max(self.deadline - self._clock(), 0.0)

    @property
    def metadata(self) -> Metadata:
        """The caller's; and how long the call has been here, which its budgets are less by."""
        held_s = self.elapsed_s
        if held_s < NOTED_S:
            return self._metadata
        return (*self._metadata, (HELD_KEY, str(round(1e6 * held_s))))

    async def next(self) -> ReplicaConnection:
        """The replica to ask now; waits for one to come. Raises `NotReady` when time is up."""
        while True:
            link = self._fleet.choose(self.due - self._clock(), self._tried)
            if link is not None:
                self._tried.append(link)
                self.count += 1
                return link
            left_s = self._give_up - self._clock()
            if left_s <= 0:
                raise NotReady("no replica answers; try again later")
            if not self._tried:
                await self._fleet.change(left_s)
                continue
            self._tried.clear()
            await self._fleet.change(min(left_s, self._pause_s * _random.uniform(0.5, 1.5)))
            self._pause_s = min(2 * self._pause_s, MAX_BACK_OFF_S)

    def other_models(self, than: ReplicaConnection) -> bool:
        """From now on only replicas with other models than this one's; whether there are any."""
        alike = [link for link in self._fleet.serving if link.models == than.models]
        self._tried += [link for link in alike if link not in self._tried]
        return any(link not in self._tried for link in self._fleet.serving)


def _budget_s(metadata: Metadata) -> float:
    """As metadata names it; a malformed one is for the replica to refuse."""
    values = [value for key, value in metadata if key == METADATA_KEY]
    try:
        return float(values[0]) / 1e3 if values else math.inf
    except ValueError:
        return math.inf

"""One call to one replica, handed on to the caller: messages, metadata, and how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from ladderstitch.api.status import Context
from ladderstitch.gateway.replica_connection import Link
from ladderstitch.gateway.retry import Attempts, Metadata

SICKNESS = frozenset({"UNAVAILABLE", "INTERNAL", "UNKNOWN"})


class Failure(Exception):
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
    link: Link, method: str, request: bytes, context: Context, attempts: Attempts
) -> bytes:
    """One message for one; raises `Failure`."""
    call = link.stub("unary_unary", method)(
        request, timeout=attempts.timeout_s, metadata=attempts.metadata
    )
    with _under_way(link, call, attempts):
        reply: bytes = await asyncio.shield(call)
        await _open(call, context)
        await _close(call, context)
    return reply


async def ask_stream(
    link: Link, method: str, request: bytes, context: Context, attempts: Attempts
) -> None:
    """Messages for one; raises `Failure`."""
    call = link.stub("unary_stream", method)(
        request, timeout=attempts.timeout_s, metadata=attempts.metadata
    )
    with _under_way(link, call, attempts) as progress:
        await _hand_on(call, context, progress)


async def converse(
    link: Link, method: str, requests: Any, context: Context, attempts: Attempts
) -> None:
    """Messages both ways; raises `Failure`, begun: what the caller sent is gone."""
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
    link: Link, call: Any, attempts: Attempts, *, begun: bool = False
) -> Iterator[_Progress]:
    """While the call lasts; whatever ends it but the caller's own leaving becomes a `Failure`."""
    progress = _Progress(begun)
    mark = link.opened(call, attempts.due)
    try:
        yield progress
    except grpc.aio.AioRpcError as error:
        raise Failure(
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
        raise Failure(unavailable, "the replica was lost", progress.begun) from None
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

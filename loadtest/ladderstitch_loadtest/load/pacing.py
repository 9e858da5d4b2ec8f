"""The open loop that all load shares: a request is sent when it is due, and timed from then.

Requests are sent whether or not earlier ones are answered. Latency counts from the time at which a
request was due, so a stall of the generator shows in the figures instead of hiding in them
(coordinated omission). The three kinds of load are `image_load`, `text_load` and `in_process`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import grpc

R = TypeVar("R")
SendCall = Callable[[bytes], Awaitable[bytes]]
"""Sends a serialised request and returns the reply; raises `grpc.aio.AioRpcError`."""


@dataclass(frozen=True, slots=True)
class TimedReply(Generic[R]):
    """The result of one request: `code` is `OK` or the gRPC status, `reply` is None unless `OK`.

    `took_s` is the time from when the request was due to its end, `lag_s` the time from when it was
    due to when it was sent, in seconds.
    """

    code: str
    took_s: float
    lag_s: float
    reply: R | None


async def due_times(
    start: float, offsets_s: Iterable[float], *, spin_s: float = 0.0
) -> AsyncIterator[float]:
    """Yield `start` plus each offset, by `time.monotonic`, each as soon as that time has come.

    The event loop sleeps in whole milliseconds. The last `spin_s` seconds of a wait are spent
    turning the loop instead, which is exact but takes CPU time.
    """
    for offset in offsets_s:
        due = start + offset
        while (delay := due - time.monotonic()) > 0:  # noqa: ASYNC110 # time is the event
            await asyncio.sleep(max(0.0, delay - spin_s))
        yield due


async def send_timed(
    call: SendCall, message: bytes, due: float, parse: Callable[[bytes], R]
) -> TimedReply[R]:
    """Send a request that was due at `due`, and return the result with the parsed reply."""
    lag_s = time.monotonic() - due
    try:
        reply = await call(message)
    except grpc.aio.AioRpcError as error:
        return TimedReply(error.code().name, time.monotonic() - due, lag_s, None)
    took_s = time.monotonic() - due
    return TimedReply("OK", took_s, lag_s, parse(reply))

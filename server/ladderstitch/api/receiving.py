"""How messages of unary calls are received: within a time limit, few unfinished ones at once.

gRPC's core holds a message in memory until it is complete, and compares its size with the maximum
only then. Until a server reads, however, the core accepts no more than its window, 64 KiB. The
interceptor here therefore reads itself, and calls that are rejected by their headers are not read.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from ladderstitch.api.auth import OPEN_SERVICES
from ladderstitch.api.status import (
    Context,
    abort,
    handler_function,
    replace_handler_function,
)
from ladderstitch.errors import InvalidArgument, Overloaded, RequestError

UNFINISHED_AGE_S = 1.0
"""Seconds after which an unfinished message may be given up in favour of newer ones."""
RETRY_AFTER_S = 1.0
OPEN_TIMEOUT_S = 2.0
"""Seconds in which the message of a call without a token must arrive; it is below 1 KiB."""
OPEN_TURN_S = 0.05
"""Seconds after which such a message is given up if other calls wait for their turn."""
MAX_OPEN_UNFINISHED = 4
"""Maximum number of messages of calls without a token that are read at once."""
MAX_OPEN_WAITING = 1000
"""Maximum number of calls without a token that wait for their turn; each holds up to 64 KiB."""
TURNS_OF_THE_LOOP = 6
"""Turns in which a message that has arrived is delivered, also after the loop was held.

Three are for the message, and three for the end of the caller's messages.
"""


@dataclass(eq=False, slots=True)
class _Unfinished:
    started: float
    timeout: asyncio.Timeout
    displaced: bool = False


class MessageReceiver:
    """Reads one message a call, at most `max_unfinished` at once.

    Above that number, the oldest message that has not arrived within a second is given up.
    """

    def __init__(self, max_unfinished: int, timeout_s: float) -> None:
        self._max_unfinished, self._timeout_s = max_unfinished, timeout_s
        self._unfinished: dict[_Unfinished, None] = {}

    async def receive(self, context: Context) -> bytes:
        """Return the call's message.

        Raises `InvalidArgument` if it does not arrive in time or is not the only one, and
        `Overloaded` if it is given up.
        """
        now = asyncio.get_running_loop().time()
        timeout = asyncio.timeout_at(now + self._timeout_s)
        current = _Unfinished(now, timeout)
        self._unfinished[current] = None
        self._displace_oldest(now)
        try:
            async with timeout:
                return await _read_single(context)
        except TimeoutError:
            if current.displaced:
                raise Overloaded("too many unfinished messages", RETRY_AFTER_S) from None
            raise _late(self._timeout_s) from None
        finally:
            self._unfinished.pop(current, None)

    def _displace_oldest(self, now: float) -> None:
        while len(self._unfinished) > self._max_unfinished:
            oldest = next(iter(self._unfinished))
            if now - oldest.started < UNFINISHED_AGE_S:
                return
            del self._unfinished[oldest]
            oldest.displaced = True
            oldest.timeout.reschedule(now)


class OpenMessageReceiver:
    """Reads the messages of calls without a token, a few at once; the other calls wait unread."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._turns = asyncio.Semaphore(MAX_OPEN_UNFINISHED)
        self._waiting = 0

    async def receive(self, context: Context) -> bytes:
        """Return the call's message.

        Raises `InvalidArgument` if it does not arrive in time or is not the only one, and
        `Overloaded` if it is given up or too many calls wait.
        """
        if self._waiting >= MAX_OPEN_WAITING:
            raise Overloaded("too many calls without a token", RETRY_AFTER_S)
        self._waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self._waiting -= 1
        try:
            return await self._read(context)
        finally:
            self._turns.release()

    async def _read(self, context: Context) -> bytes:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._timeout_s
        reading = asyncio.ensure_future(_read_single(context))
        try:
            while not await _is_done(reading, OPEN_TURN_S):
                if loop.time() >= until:
                    raise _late(self._timeout_s)
                if self._waiting:
                    raise Overloaded("too many unfinished messages", RETRY_AFTER_S)
            return await reading
        finally:
            reading.cancel()


async def _is_done(reading: asyncio.Future[Any], seconds: float) -> bool:
    """Wait; return whether the message has arrived."""
    await asyncio.wait({reading}, timeout=seconds)
    for _ in range(TURNS_OF_THE_LOOP):
        if reading.done():
            break
        await asyncio.sleep(0)
    return reading.done()


def _late(timeout_s: float) -> InvalidArgument:
    return InvalidArgument(
        "message",
        f"expected all of it, and the end of the messages, within {timeout_s:g} s, got a part",
    )


async def _read_single(context: Context) -> bytes:
    """Return the only message of a call; raises `InvalidArgument` if there is none, or another.

    A second message would otherwise be ignored: gRPC's core does not look for one.
    """
    message = await context.read()
    if message is grpc.aio.EOF:
        raise InvalidArgument("message", "expected one, got none")
    if await context.read() is not grpc.aio.EOF:
        raise InvalidArgument("message", "expected one, got more")
    assert isinstance(message, bytes), "the handler has no deserializer"
    return message


class ReceiveInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc] # grpc ships no types
    """An interceptor that receives and parses the messages of unary calls; the first in order.

    The servers of one replica or gateway share it, and with it its limits.
    """

    def __init__(self, max_unfinished: int = 128, timeout_s: float = 30.0) -> None:
        """Receive messages within `timeout_s` seconds, at most `max_unfinished` at once."""
        self._receiver = MessageReceiver(max_unfinished, timeout_s)
        self._open_receiver = OpenMessageReceiver(min(timeout_s, OPEN_TIMEOUT_S))

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Return the handler of a call; that of a stream of requests is not changed."""
        handler = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler
        service = details.method.lstrip("/").partition("/")[0]
        receiver = self._open_receiver if service in OPEN_SERVICES else self._receiver
        return _receiving_handler(handler, receiver)


def _receiving_handler(
    handler: grpc.RpcMethodHandler, receiver: MessageReceiver | OpenMessageReceiver
) -> grpc.RpcMethodHandler:
    """Return a handler that gRPC gives no message, so that it reads the message itself."""
    function, parse = handler_function(handler), handler.request_deserializer

    async def receive(context: Context) -> Any:
        try:
            return parse_message(parse, await receiver.receive(context))
        except RequestError as error:
            await abort(context, error)

    async def call(_: Any, context: Context) -> Any:
        return await function(await receive(context), context)

    async def stream(_: Any, context: Context) -> AsyncIterator[Any]:
        async for reply in function(await receive(context), context):
            yield reply

    receiving = stream if inspect.isasyncgenfunction(function) else call
    return replace_handler_function(handler, receiving, parse=False, stream=True)


def parse_message(parse: Callable[[bytes], Any] | None, message: bytes) -> Any:
    """Return a parsed message; raises `InvalidArgument` for bytes that are none."""
    if parse is None:
        return message
    try:
        return parse(message)
    except DecodeError as error:
        raise InvalidArgument(
            "message", f"expected the method's request, got {len(message)} other bytes"
        ) from error

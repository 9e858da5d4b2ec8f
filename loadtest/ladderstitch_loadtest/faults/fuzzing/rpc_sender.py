"""Sends cases over gRPC as bytes, on a few connections, and returns how each call ended."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import grpc

from ladderstitch.client import RequestFailed
from ladderstitch_loadtest.faults.fuzzing.cases import Answer, Case, Protocol

CONNECTIONS = 4
CORE_ERROR = "Internal error from Core"
"""The text of the client's own error when it sends a message on a stream that has just ended."""
ATTEMPTS = 4
PACE_S = 0.05
"""Pause between two messages of a stream when it is sent again after that error."""
HANG_S = 60.0
"""Time after which a call without a deadline counts as a hang."""


class RpcSender:
    """Connections to one address that take turns."""

    def __init__(self, address: str, hang_s: float = HANG_S) -> None:
        self._hang_s = hang_s
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [
            grpc.aio.insecure_channel(address, options=options) for _ in range(CONNECTIONS)
        ]
        self._turns = itertools.cycle(self._channels)
        self._methods: dict[tuple[grpc.aio.Channel, str], Any] = {}

    async def send(self, case: Case) -> Answer:
        """Send a case and wait for its end.

        A stream is sent again if the client's own error hides the status of the server.
        """
        answer = await self._send_once(case, 0.0)
        for _ in range(ATTEMPTS - 1):
            if not answer.message.startswith(CORE_ERROR):
                break
            answer = await self._send_once(case, PACE_S)
        if answer.message.startswith(CORE_ERROR) and case.deadline_s is not None:
            answer.status = "DEADLINE_EXCEEDED"  # before the first message was sent
        return answer

    async def _send_once(self, case: Case, pace_s: float) -> Answer:
        answer = Answer("OK")
        call = self._call(case, pace_s)
        try:
            if case.entrance.protocol is Protocol.UNARY:
                answer.body.append(await call)
            else:
                await self._read(call, case, answer)
        except grpc.aio.AioRpcError as error:
            failed = RequestFailed(error)
            answer.status, answer.reason = failed.code.name, failed.reason
            answer.message = failed.message
            if _is_hang(failed, case):
                answer.status = "hang"
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr] # within a task
                raise
            answer.status = "cancelled"
        return answer

    async def _read(self, call: Any, case: Case, answer: Answer) -> None:
        if case.cancel_after == 0:
            call.cancel()
        async for response in call:
            answer.body.append(response)
            if len(answer.body) == case.cancel_after:
                call.cancel()

    def _call(self, case: Case, pace_s: float) -> Any:
        timeout_s = self._hang_s if case.deadline_s is None else case.deadline_s
        protocol = case.entrance.protocol
        method = self._method(case.entrance.method, protocol)
        request: Any = case.messages[0]
        if protocol is Protocol.BIDIRECTIONAL:
            request = _iterate(case.messages, pace_s)
        return method(request, timeout=timeout_s, metadata=case.headers)

    def _method(self, path: str, protocol: Protocol) -> Any:
        channel = next(self._turns)
        if (channel, path) not in self._methods:
            kinds = {
                Protocol.UNARY: channel.unary_unary,
                Protocol.SERVER_STREAM: channel.unary_stream,
                Protocol.BIDIRECTIONAL: channel.stream_stream,
            }
            self._methods[channel, path] = kinds[protocol](path)
        return self._methods[channel, path]

    async def close(self) -> None:
        """Close all connections."""
        for channel in self._channels:
            await channel.close()


def _is_hang(failed: RequestFailed, case: Case) -> bool:
    """Return whether the caller's time ended, and no deadline of the case explains it."""
    is_late = failed.code is grpc.StatusCode.DEADLINE_EXCEEDED and not failed.reason
    return is_late and case.deadline_s is None


async def _iterate(messages: tuple[bytes, ...], pace_s: float) -> AsyncIterator[bytes]:
    for message in messages:
        yield message
        await asyncio.sleep(pace_s)

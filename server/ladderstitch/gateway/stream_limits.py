"""Limits of a token for the requests of one stream, which the gateway forwards as bytes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

from google.protobuf.message import DecodeError

from ladderstitch.api.auth import PER_REQUEST_METHODS, admit_request, is_limited
from ladderstitch.api.status import Context
from ladderstitch.errors import RequestError
from ladderstitch.oip import grpc_service_pb2 as pb

FINAL = "triton_final_response"


class LimitedStream:
    """The requests of one stream, each of which counts as in flight until its last response.

    It is also the context of the call for the tasks that write to it: gRPC takes one message at a
    time. The gateway does not read which request a response belongs to, which does not matter: all
    of them are of one token. After `close`, none is in flight.
    """

    def __init__(self, path: str, context: Context) -> None:
        self._context, self._writing = context, asyncio.Lock()
        self._is_limited = path.rpartition("/")[2] in PER_REQUEST_METHODS and is_limited()
        self._in_flight: deque[ExitStack] = deque()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def admitted(self, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield the requests within the limits of the token; the others are answered here."""
        async for request in requests:
            if self._is_limited:
                admission = ExitStack()
                try:
                    admission.enter_context(admit_request())
                except RequestError as error:
                    await self._write(_refusal(request, error))
                    continue
                self._in_flight.append(admission)
            yield request

    async def write(self, message: bytes) -> None:
        """Write a response of the replica when the messages before it are written.

        If it is the last one of its request, that request is no longer in flight: its caller may
        send the next one as soon as the response arrives.
        """
        if self._in_flight and _is_last(message):
            self._in_flight.popleft().close()
        await self._write(message)

    async def _write(self, message: bytes) -> None:
        async with self._writing:
            await self._context.write(message)

    def close(self) -> None:
        """Count no request of the stream as in flight."""
        while self._in_flight:
            self._in_flight.pop().close()


def _is_last(message: bytes) -> bool:
    """Return whether a response of `ModelStreamInfer` is the last one of its request.

    Models with one response for each request do not mark it as the last one.
    """
    try:
        response = pb.ModelStreamInferResponse.FromString(message)
    except DecodeError:
        return True  # nothing else would end its request
    parameters = response.infer_response.parameters
    is_marked = FINAL in parameters
    return bool(response.error_message) or not is_marked or parameters[FINAL].bool_param


def _refusal(request: bytes, error: RequestError) -> bytes:
    """Return the answer to one request of `ModelStreamInfer`, which does not end the stream."""
    answer = pb.ModelStreamInferResponse(error_message=f"{error.reason}: {error}")
    try:
        answer.infer_response.id = pb.ModelInferRequest.FromString(request).id
    except DecodeError:
        answer.infer_response.id = ""
    answer.infer_response.parameters[FINAL].bool_param = True
    return answer.SerializeToString()

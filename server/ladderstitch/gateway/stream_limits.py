"""Limits of a token for the requests of one stream, which the gateway forwards as bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.message import DecodeError

from ladderstitch.api.auth import PER_REQUEST_METHODS, admit_request
from ladderstitch.api.status import Context
from ladderstitch.errors import RequestError
from ladderstitch.oip import grpc_service_pb2 as pb


class SerialContext:
    """The context of a call that several tasks write to: gRPC takes one message at a time."""

    def __init__(self, context: Context) -> None:
        self._context, self._writing = context, asyncio.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: bytes) -> None:
        """Write a message when those before it are written."""
        async with self._writing:
            await self._context.write(message)


async def admitted_requests(
    path: str, requests: AsyncIterator[bytes], context: SerialContext
) -> AsyncIterator[bytes]:
    """Yield the requests of a stream within the limits of its token; the others are answered here.

    The gateway does not see which request an answer belongs to: it counts their rate, and the
    replica also counts those in flight.
    """
    limited = path.rpartition("/")[2] in PER_REQUEST_METHODS
    async for request in requests:
        if not limited:
            yield request
            continue
        try:
            with admit_request():
                pass
        except RequestError as error:
            await context.write(_refusal(request, error))
        else:
            yield request


def _refusal(request: bytes, error: RequestError) -> bytes:
    """Return the answer to one request of `ModelStreamInfer`, which does not end the stream."""
    answer = pb.ModelStreamInferResponse(error_message=f"{error.reason}: {error}")
    try:
        answer.infer_response.id = pb.ModelInferRequest.FromString(request).id
    except DecodeError:
        answer.infer_response.id = ""
    answer.infer_response.parameters["triton_final_response"].bool_param = True
    return answer.SerializeToString()

"""`ModelStreamInfer`: many requests on one stream, each of which ends by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

from google.protobuf.message import DecodeError

from ladderstitch.api.auth import admit_request
from ladderstitch.api.status import as_request_error
from ladderstitch.errors import InvalidArgument
from ladderstitch.oip import grpc_service_pb2 as pb

MAX_IN_FLIGHT = 256
"""Requests of one stream that are in progress at the same time; further ones are read later."""
MAX_QUEUED_RESPONSES = 64
"""Responses of one stream that wait for the transport."""


class MalformedMessage:
    """A message of a stream that is not a `ModelInferRequest`; its stream continues."""

    model_name = id = ""


Item = pb.ModelInferRequest | MalformedMessage
Respond = Callable[[pb.ModelInferRequest], AsyncGenerator[pb.ModelInferResponse]]
"""A function that yields the responses to one request of a stream."""
Responses = asyncio.Queue[pb.ModelStreamInferResponse | None]
"""The responses of a stream that wait for the transport; None after the last one."""


def parse_item(message: bytes) -> Item:
    """Return the request in a message of a stream.

    An exception would end the stream, so that a malformed message is returned as such.
    """
    try:
        return pb.ModelInferRequest.FromString(message)
    except DecodeError:
        return MalformedMessage()


async def answer_stream(
    requests: AsyncIterator[Item], respond: Respond
) -> AsyncGenerator[pb.ModelStreamInferResponse]:
    """Yield the responses to all requests of a stream as they are made.

    A request that fails, by whatever exception, ends with an `error_message` and does not affect
    the others. Closing the generator cancels all requests. If reading the requests fails, those
    read before are answered, and then its exception is raised.
    """
    ready: Responses = asyncio.Queue(MAX_QUEUED_RESPONSES)
    reading = asyncio.create_task(_answer_all(requests, respond, ready))
    try:
        while (response := await _next_response(ready, reading)) is not None:
            yield response
        await reading
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def _answer_all(requests: AsyncIterator[Item], respond: Respond, ready: Responses) -> None:
    """Answer the requests, at most `MAX_IN_FLIGHT` at a time; raise what reading them raises."""
    in_flight = asyncio.Semaphore(MAX_IN_FLIGHT)
    failure: Exception | None = None

    async def answer(request: Item) -> None:
        try:
            await _answer(request, respond, ready)
        finally:
            in_flight.release()

    async with asyncio.TaskGroup() as group:
        try:
            async for request in requests:
                await in_flight.acquire()
                group.create_task(answer(request))
        except Exception as error:
            failure = error
    await ready.put(None)
    if failure is not None:
        raise failure


async def _answer(request: Item, respond: Respond, ready: Responses) -> None:
    try:
        with admit_request():
            if isinstance(request, MalformedMessage):
                raise InvalidArgument("message", "expected a ModelInferRequest, got other bytes")
            async with aclosing(respond(request)) as responses:
                async for response in responses:
                    await ready.put(pb.ModelStreamInferResponse(infer_response=response))
    except BaseException as caught:
        error = as_request_error("ModelStreamInfer", caught)
        failed = pb.ModelStreamInferResponse(error_message=f"{error.reason}: {error}")
        failed.infer_response.id = request.id
        failed.infer_response.parameters["triton_final_response"].bool_param = True
        await ready.put(failed)


async def _next_response(
    ready: Responses, reading: asyncio.Task[None]
) -> pb.ModelStreamInferResponse | None:
    """Return the next response; raises the exception of `reading` if that task has failed."""
    getting = asyncio.ensure_future(ready.get())
    try:
        await asyncio.wait({getting, reading}, return_when=asyncio.FIRST_COMPLETED)
        if not getting.done() and ready.empty():
            reading.result()
        return await getting
    finally:
        getting.cancel()

"""`ModelStreamInfer`: requests come and responses go on one stream, each at its own pace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

from ladderstitch.errors import RequestError
from ladderstitch.oip import grpc_service_pb2 as pb

MOST_IN_FLIGHT = 256
"""Requests of one stream that are worked on; the next is read when one has ended."""

Respond = Callable[[pb.ModelInferRequest], AsyncGenerator[pb.ModelInferResponse]]


async def answer_stream(
    requests: AsyncIterator[pb.ModelInferRequest], respond: Respond
) -> AsyncGenerator[pb.ModelStreamInferResponse]:
    """All responses to all requests as they are made; a request that fails ends in an
    `error_message` and leaves the others alone. Closing it ends all work."""
    ready: asyncio.Queue[pb.ModelStreamInferResponse | None] = asyncio.Queue(maxsize=64)
    places = asyncio.Semaphore(MOST_IN_FLIGHT)

    async def work(request: pb.ModelInferRequest) -> None:
        try:
            async with aclosing(respond(request)) as responses:
                async for response in responses:
                    await ready.put(pb.ModelStreamInferResponse(infer_response=response))
        except RequestError as error:
            failed = pb.ModelStreamInferResponse(error_message=f"{error.reason}: {error}")
            failed.infer_response.id = request.id
            failed.infer_response.parameters["triton_final_response"].bool_param = True
            await ready.put(failed)
        finally:
            places.release()

    async def read() -> None:
        async with asyncio.TaskGroup() as group:
            async for request in requests:
                await places.acquire()
                group.create_task(work(request))
        await ready.put(None)

    reading = asyncio.create_task(read())
    try:
        while (response := await _next(ready, reading)) is not None:
            yield response
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def _next(
    ready: asyncio.Queue[pb.ModelStreamInferResponse | None], reading: asyncio.Task[None]
) -> pb.ModelStreamInferResponse | None:
    """The next response; raises what ended the reading, if something did."""
    getting = asyncio.ensure_future(ready.get())
    try:
        await asyncio.wait({getting, reading}, return_when=asyncio.FIRST_COMPLETED)
        if not getting.done() and reading.exception() is not None:
            reading.result()
        return await getting
    finally:
        getting.cancel()

"""The answers to requests of OpenAI's API, whole or as streams of server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ladderstitch.api.deadlines import held_seconds
from ladderstitch.api.native.generation import tenant_of
from ladderstitch.api.openai.access import IN_FLIGHT
from ladderstitch.api.openai.answer_so_far import chunks_so_far
from ladderstitch.api.openai.bodies import ChatRequest, CompletionRequest
from ladderstitch.api.openai.body import parse_body
from ladderstitch.api.openai.choices import MergedStreams, NumberedChunk
from ladderstitch.api.openai.errors import error_body
from ladderstitch.api.openai.event_marks import EventMarker
from ladderstitch.api.openai.fields import StreamOptions
from ladderstitch.api.openai.models import NamedModel, find_model
from ladderstitch.api.openai.request_ids import MODEL
from ladderstitch.api.openai.requests import AcceptedRequest, accept_request
from ladderstitch.api.openai.responses import (
    DONE,
    ResponseBuilder,
    error_event,
    named_event,
    server_sent_event,
)
from ladderstitch.api.openai.stateless_responses import (
    ResponseRequest,
    ResponseWriter,
    rename_field,
)
from ladderstitch.errors import InternalError, InvalidArgument, RequestError
from ladderstitch.hosting.registry import ModelRegistry
from ladderstitch.scheduling.generation import TokenChunk
from ladderstitch.scheduling.requests import MAX_ID_CHARACTERS

T = TypeVar("T")

CLIENT_CLOSED_REQUEST = Response(status_code=499)
"""499: client closed the connection."""
MAX_PROMPT_AT_ONCE = 64
"""Tokens of a prompt whose log probabilities are written at once, within 8 ms."""
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""Headers of streams: caches and nginx pass every event on at once."""


class EventStreamResponse(StreamingResponse):
    """A stream of server-sent events that owns resources and closes them however it ends.

    The generator of the events alone cannot close them: if the client disconnects before the head
    of the response is sent, the generator is never started.
    """

    def __init__(
        self, events: AsyncGenerator[str], resources: AsyncExitStack, marker: EventMarker
    ) -> None:
        headers = STREAM_HEADERS | marker.headers
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events, self._resources = events, resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head and the events."""
        async with self._resources, aclosing(self._events):
            await super().__call__(scope, receive, send)


def in_flight(request: Request) -> AsyncExitStack:
    """Return the stack that counts the request as in flight until it is closed."""
    in_flight: AsyncExitStack = request.scope[IN_FLIGHT]
    return in_flight.pop_all()


async def answer_request(
    registry: ModelRegistry, fields: type[CompletionRequest | ChatRequest], request: Request
) -> Response:
    """Answer a request for completions or for a chat, whose body has these fields."""
    arrival = time.monotonic() - held_seconds(request.headers.items())
    async with in_flight(request) as resources:
        body = await parse_body(request, fields)
        named = find_model(registry, body.model)
        request.scope["state"][MODEL] = named.id[:MAX_ID_CHARACTERS]
        marker = EventMarker.for_headers(request.headers)
        accepted = await _accept(named, body, request, arrival)
        is_chat = isinstance(body, ChatRequest)
        builder = ResponseBuilder(named.model, accepted, is_chat, named.id, marker.name)
        opening = MergedStreams.open(named.model.scheduler, accepted.generations)
        stream = await resources.enter_async_context(aclosing(await opening))
        if not body.stream:
            collected = await _run_until_disconnect(_collect(stream, accepted), request)
            if collected is None:
                return CLIENT_CLOSED_REQUEST
            return await _whole_answer(builder, accepted, collected)
        await _replay(builder, named, accepted)
        # An error before the first token still gets its own HTTP status.
        first = await _run_until_disconnect(_next_chunk(stream), request)
        if first is None:
            return CLIENT_CLOSED_REQUEST
        options, owned = body.stream_options or StreamOptions(), resources.pop_all()
        marker.enabled &= len(accepted.generations) == 1
        include_usage = bool(options.include_usage)
        events = _events(first, stream, builder, owned, marker, include_usage=include_usage)
        return EventStreamResponse(events, owned, marker)


async def answer_response_request(registry: ModelRegistry, request: Request) -> Response:
    """Answer a request of `/v1/responses`."""
    arrival = time.monotonic() - held_seconds(request.headers.items())
    async with in_flight(request) as resources:
        body = await parse_body(request, ResponseRequest)
        named = find_model(registry, body.model)
        request.scope["state"][MODEL] = named.id[:MAX_ID_CHARACTERS]
        marker = EventMarker.for_headers(request.headers)
        try:
            accepted = await _accept(named, body.to_chat(), request, arrival)
            opened = await MergedStreams.open(named.model.scheduler, accepted.generations)
        except InvalidArgument as error:
            raise rename_field(error) from None
        writer = ResponseWriter(body, marker.name)
        stream = await resources.enter_async_context(aclosing(opened))
        if not body.stream:
            collected = await _run_until_disconnect(_collect(stream, accepted), request)
            if collected is None:
                return CLIENT_CLOSED_REQUEST
            for chunk in collected[0]:
                writer.add(chunk)
            return JSONResponse(writer.whole())
        await _replay(writer, named, accepted)
        first = await _run_until_disconnect(_next_chunk(stream), request)
        if first is None:
            return CLIENT_CLOSED_REQUEST
        owned = resources.pop_all()
        events = _response_events(first, stream, writer, owned, marker)
        return EventStreamResponse(events, owned, marker)


async def _replay(
    writer: ResponseBuilder | ResponseWriter, named: NamedModel, accepted: AcceptedRequest
) -> None:
    """Let a writer take over the tokens that the caller has of another replica."""
    (first, *_) = accepted.generations
    if first.answered:
        chunks = chunks_so_far(first, named.model.scheduler.tokenizer)
        await asyncio.to_thread(writer.replay, chunks)


async def _response_events(
    first: NumberedChunk,
    stream: MergedStreams,
    writer: ResponseWriter,
    resources: AsyncExitStack,
    marker: EventMarker,
) -> AsyncGenerator[str]:
    """Yield the events of a response; the last one has the whole response, or is an error."""
    last_events: list[str] = []
    try:
        async with resources:
            for event in writer.begin():
                yield named_event(event)
            yield marker.before_token(first[1]) + named_event(writer.delta(first[1]))
            async for _, chunk in stream:
                yield marker.before_token(chunk) + named_event(writer.delta(chunk))
        last_events = [named_event(event) for event in writer.end()]
    except RequestError as error:
        last_events = [marker.before_error(error) + named_event(error_event(error))]
    except Exception as error:
        hidden = InternalError.logged("HTTP stream", error)
        last_events = [marker.before_error(hidden) + named_event(error_event(hidden))]
    for last in last_events:
        yield last


async def _accept(
    named: NamedModel,
    body: CompletionRequest | ChatRequest,
    request: Request,
    arrival: float,
) -> AcceptedRequest:
    tenant = tenant_of(request.headers.items())
    try:
        return await accept_request(body, named, request.headers, arrival, tenant)
    except RequestError as error:
        named.model.metrics.observe_rejection(error.code, had_budget=False)
        raise


async def _events(
    first: NumberedChunk,
    stream: MergedStreams,
    builder: ResponseBuilder,
    resources: AsyncExitStack,
    marker: EventMarker,
    *,
    include_usage: bool,
) -> AsyncGenerator[str]:
    """Yield the events of a stream; the last one is [DONE] or the error that ended it.

    The resources are closed before the last event: the client may send its next request then.
    """
    try:
        async with resources:
            yield marker.before_token(first[1]) + await _chunk_event(builder, *first)
            async for number, chunk in stream:
                yield marker.before_token(chunk) + await _chunk_event(builder, number, chunk)
            if include_usage:
                yield server_sent_event(builder.usage_chunk())
        last_event = DONE
    except RequestError as error:
        last_event = marker.before_error(error) + server_sent_event(error_body(error))
    except Exception as error:
        hidden = InternalError.logged("HTTP stream", error)
        last_event = marker.before_error(hidden) + server_sent_event(error_body(hidden))
    yield last_event


async def _whole_answer(
    builder: ResponseBuilder, accepted: AcceptedRequest, generations: list[list[TokenChunk]]
) -> Response:
    """Return the whole answer; log probabilities, of which there may be many, in a thread."""
    if not accepted.reports_logprobs:
        return JSONResponse(builder.full_response(generations))

    def write() -> bytes:
        """Return the answer as JSON, by an encoder in Python, so that other threads run, too."""
        encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return "".join(encoder.iterencode(builder.full_response(generations))).encode()

    return Response(await asyncio.to_thread(write), media_type="application/json")


async def _chunk_event(builder: ResponseBuilder, number: int, chunk: TokenChunk) -> str:
    """Return the event of a chunk; the first one may have the log probabilities of its prompt."""
    if len(chunk.prompt) <= MAX_PROMPT_AT_ONCE:
        return server_sent_event(builder.chunk(number, chunk))
    return server_sent_event(await asyncio.to_thread(builder.chunk, number, chunk))


async def _next_chunk(stream: MergedStreams) -> NumberedChunk:
    return await anext(stream)


async def _collect(stream: MergedStreams, accepted: AcceptedRequest) -> list[list[TokenChunk]]:
    """Return the chunks of each generation."""
    collected: list[list[TokenChunk]] = [[] for _ in accepted.generations]
    async for number, chunk in stream:
        collected[number].append(chunk)
    return collected


async def _run_until_disconnect(work: Coroutine[Any, Any, T], request: Request) -> T | None:
    """Return the result of `work`, or cancel it and return None if the client disconnects."""
    working = asyncio.create_task(work)
    disconnecting = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({working, disconnecting}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (working, disconnecting):
            task.cancel()
        await asyncio.gather(working, disconnecting, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""A stream over HTTP goes on at another replica when the one that gives it breaks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from ladderstitch.api.openai.event_marks import ANSWER_HEADER, MARK, AnswerName
from tests.support.fake_replicas import RunningGateway, StartGateway
from tests.support.http_replicas import HttpReplica, calling

PATH = "/v1/completions"
BODY = b' {"model": "tiny", "max_tokens": 6,\t"answer_so_far": null, "temperature": 1e0 } \n'
DONE = b"data: [DONE]\n\n"
NAME = str(AnswerName("0123456789abcdef" * 2, 1_700_000_000))
Script = Callable[[web.Request, web.StreamResponse, int], Awaitable[None]]


def event(index: int, total: int = 6) -> bytes:
    """Return the event of a token as a replica writes it, with its mark."""
    mark: dict[str, Any] = {"index": index, "token": 100 + index}
    if index + 1 == total:
        mark["status"] = "OK"
    return MARK + json.dumps(mark).encode() + b"\n" + plain(index)


def plain(index: int) -> bytes:
    """Return the event of a token as a caller receives it."""
    return b'data: {"text":"%d"}\n\n' % index


COMPLETE = b"".join(plain(index) for index in range(6)) + b'data: {"usage":1}\n\n' + DONE


async def known_tokens(request: web.Request) -> list[int]:
    """Return the tokens that the caller has, by the gateway's account."""
    field = json.loads(await request.text())["answer_so_far"]
    return [] if field is None else field["token_ids"]


def scripted(script: Script) -> list[HttpReplica]:
    """Return two replicas whose streams of events are those of a script.

    It gets the request, the response, and the number of tokens that the caller has.
    """

    async def respond(request: web.Request) -> web.StreamResponse:
        headers = {"content-type": "text/event-stream"}
        if ANSWER_HEADER in request.headers:
            headers[ANSWER_HEADER] = request.headers[ANSWER_HEADER]
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        await script(request, response, len(await known_tokens(request)))
        return response

    replicas = [HttpReplica("r0"), HttpReplica("r1")]
    for replica in replicas:
        replica.respond = respond
    return replicas


async def write_rest(response: web.StreamResponse, known: int) -> None:
    """Complete an answer."""
    for index in range(known, 6):
        await response.write(event(index))
    await response.write(b'data: {"usage":1}\n\n' + DONE)


def abort(request: web.Request) -> None:
    """Break the connection."""
    assert request.transport is not None
    request.transport.abort()


async def ask(running: RunningGateway, **headers: str) -> tuple[bytes, str]:
    """Return the whole response to a request, and the header with the answer's name."""
    async with calling(running, **headers) as session, session.post(PATH, data=BODY) as response:
        return await response.read(), response.headers.get(ANSWER_HEADER, "")


def requests_to(replicas: list[HttpReplica]) -> list[web.Request]:
    """Return all requests that replicas received, in no order."""
    return [request for replica in replicas for request in replica.seen]


async def test_stream_goes_on_wherever_it_breaks(start_gateway: StartGateway) -> None:
    """The connection breaks within and between events, after the last token, and at the end."""
    complete = b"".join(event(index) for index in range(6)) + b'data: {"usage":1}\n\n' + DONE
    cut = 0

    async def break_once(request: web.Request, response: web.StreamResponse, known: int) -> None:
        if cut in cuts:
            return await write_rest(response, known)
        cuts.add(cut)
        assert known == 0
        await response.write(complete[:cut])
        await asyncio.sleep(0.01)
        abort(request)
        return None

    cuts: set[int] = set()
    replicas = scripted(break_once)
    async with start_gateway(list(replicas), http_port=0, retry_timeout_s=5) as running:
        for cut in range(1, len(complete), 9):
            assert await ask(running) == (COMPLETE, ""), cut
    bodies = [await request.text() for request in requests_to(replicas)]
    begun = [body for body in bodies if body.count("answer_so_far") == 2]
    assert {body[: len(BODY.rstrip()) - 1] for body in begun} == {BODY.rstrip()[:-1].decode()}
    assert all(json.loads(body)["answer_so_far"]["first_token_us"] > 0 for body in begun)
    found = {tuple(await known_tokens(request)) for request in requests_to(replicas)}
    assert found == {tuple(range(100, 100 + n)) for n in range(6)}


async def test_stream_survives_a_death_after_every_token(start_gateway: StartGateway) -> None:
    async def give_one(request: web.Request, response: web.StreamResponse, known: int) -> None:
        if known == 5:
            return await write_rest(response, known)
        await response.write(event(known))
        await asyncio.sleep(0.01)
        abort(request)
        return None

    replicas = scripted(give_one)
    async with start_gateway(list(replicas), http_port=0) as running:
        assert await ask(running) == (COMPLETE, "")
    assert len(requests_to(replicas)) == 6


async def test_silent_replica_loses_its_stream(start_gateway: StartGateway) -> None:
    replicas: list[HttpReplica] = []

    async def fall_silent(request: web.Request, response: web.StreamResponse, known: int) -> None:
        if not known:
            await response.write(event(0) + event(1))
            next(r for r in replicas if request in r.seen).silent = True
            await asyncio.Event().wait()
        await write_rest(response, known)

    replicas += scripted(fall_silent)
    async with start_gateway(list(replicas), http_port=0) as running:
        assert await ask(running) == (COMPLETE, "")


@pytest.mark.parametrize("how", ["unmarked", "first token"])
async def test_replica_that_begins_again_is_not_believed(
    start_gateway: StartGateway, how: str
) -> None:
    async def begin_again(request: web.Request, response: web.StreamResponse, known: int) -> None:
        await response.write(event(0) + event(1))
        await asyncio.sleep(0.01)
        abort(request)

    replicas = scripted(begin_again)
    first = replicas[0].respond

    async def respond(request: web.Request) -> web.StreamResponse:
        if how == "unmarked" and await known_tokens(request):
            return web.Response(body=plain(0), content_type="text/event-stream")
        return await first(request)

    for replica in replicas:
        replica.respond = respond
    async with start_gateway(list(replicas), http_port=0, retry_timeout_s=0.3) as running:
        received, _ = await ask(running)
    *tokens, error, rest = received.split(b"\n\n")
    assert [token + b"\n\n" for token in tokens] == [plain(0), plain(1)]
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "UNAVAILABLE"
    assert rest == b""
    assert len(requests_to(replicas)) > 2


async def test_refused_rest_ends_with_its_error(start_gateway: StartGateway) -> None:
    async def break_off(request: web.Request, response: web.StreamResponse, known: int) -> None:
        await response.write(event(0))
        await asyncio.sleep(0.01)
        abort(request)

    replicas = scripted(break_off)
    first = replicas[0].respond

    async def respond(request: web.Request) -> web.StreamResponse:
        if await known_tokens(request):
            return web.json_response({"error": {"code": "NO"}}, status=400)
        return await first(request)

    for replica in replicas:
        replica.respond = respond
    async with start_gateway(list(replicas), http_port=0) as running:
        received, _ = await ask(running)
    assert received == plain(0) + b'data: {"error": {"code": "NO"}}\n\n'


@pytest.mark.parametrize("status", ["UNAVAILABLE", "DEADLINE_EXCEEDED"])
async def test_error_of_the_replica_decides(start_gateway: StartGateway, status: str) -> None:
    error = b'data: {"error":"x"}\n\n'

    async def fail(request: web.Request, response: web.StreamResponse, known: int) -> None:
        if known:
            return await write_rest(response, known)
        await response.write(event(0) + MARK + b'{"status":"%s"}\n' % status.encode() + error)
        return None

    async with start_gateway(list(scripted(fail)), http_port=0) as running:
        received, _ = await ask(running)
    assert received == (COMPLETE if status == "UNAVAILABLE" else plain(0) + error)


async def test_gateway_in_front_reads_the_marks_too(start_gateway: StartGateway) -> None:
    async def break_off(request: web.Request, response: web.StreamResponse, known: int) -> None:
        assert request.headers[ANSWER_HEADER] == NAME
        if known == 4:
            return await write_rest(response, known)
        assert known == 2
        await response.write(event(2) + event(3))
        await asyncio.sleep(0.01)
        abort(request)
        return None

    replicas = scripted(break_off)
    body = BODY.replace(b"null", b'{"token_ids":[100,101],"first_token_us":7}')
    async with (
        start_gateway(list(replicas), http_port=0) as running,
        calling(running) as session,
        session.post(PATH, data=body, headers={ANSWER_HEADER: NAME}) as response,
    ):
        assert response.headers[ANSWER_HEADER] == NAME
        marked = b"".join(event(index) for index in range(2, 6))
        assert await response.read() == marked + b'data: {"usage":1}\n\n' + DONE
    fields = [
        json.loads(await request.text())["answer_so_far"] for request in requests_to(replicas)
    ]
    assert {field["first_token_us"] for field in fields} == {7}

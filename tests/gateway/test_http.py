"""HTTP requests through a gateway; only the answers of the replicas are scripted."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import grpc
import pytest
from aiohttp import web
from yarl import URL

from ladderstitch.api.deadlines import HELD_KEY
from tests.support.fake_replicas import FakeReplica, StartGateway
from tests.support.http_replicas import HttpReplica, calling

TOKEN = "caller-secret-0123456789"


async def test_request_and_answer_pass_unchanged(start_gateway: StartGateway) -> None:
    replica = HttpReplica("r0")
    async with start_gateway([replica], http_port=0) as running, calling(running) as session:
        path = "/v1/completions?a=%2F%20b&a=c"
        headers = {"x-latency-budget-ms": "5", "origin": "http://127.0.0.1:9", "x-request-id": "me"}
        async with session.post(
            URL(path, encoded=True), data=b'{"model":"tiny"}', headers=headers
        ) as response:
            assert response.status == 200
            assert response.headers["x-own"] == "r0"
            assert response.headers["x-request-id"] == "me"
            assert response.headers.getall("access-control-allow-origin") == ["http://127.0.0.1:9"]
            assert len(response.headers.getall("date")) == 1
            body = await response.json()
        assert body == {"replica": "r0", "body": '{"model":"tiny"}'}
        (seen,) = replica.seen
        assert seen.raw_path == path
        assert seen.headers["x-latency-budget-ms"] == "5"
        assert "origin" not in seen.headers


async def test_events_arrive_one_by_one(start_gateway: StartGateway) -> None:
    replica, release = HttpReplica("r0"), asyncio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await release.wait()
        await response.write(b"data: 2\n\n")
        return response

    replica.respond = stream
    async with (
        start_gateway([replica], http_port=0) as running,
        calling(running) as session,
        session.post("/v1/completions", data=b"{}") as response,
    ):
        assert await response.content.readuntil(b"\n\n") == b"data: 1\n\n"
        release.set()
        assert await response.content.read() == b"data: 2\n\n"


@pytest.mark.parametrize("failure", ["status", "connection"])
async def test_another_replica_answers_what_one_cannot(
    start_gateway: StartGateway, failure: str
) -> None:
    replicas = [HttpReplica("r0"), HttpReplica("r1")]
    failing: list[HttpReplica] = []

    async def fail_first(request: web.Request) -> web.StreamResponse:
        (replica,) = [r for r in replicas if r.seen and r.seen[-1] is request]
        if failing in ([], [replica]):
            failing[:] = [replica]
            if failure == "status":
                return web.json_response({"error": "loading"}, status=503)
            assert request.transport is not None
            request.transport.abort()
        return await replica.name_itself(request)

    for replica in replicas:
        replica.respond = fail_first
    async with (
        start_gateway(list(replicas), http_port=0) as running,
        calling(running) as session,
        session.post("/v1/chat/completions", data=b"{}") as response,
    ):
        assert (response.status, (await response.json())["replica"]) == (
            200,
            next(r.name for r in replicas if r not in failing),
        )


async def test_last_refusal_is_passed_on_when_the_time_is_up(start_gateway: StartGateway) -> None:
    replica = HttpReplica("r0")

    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": "loading"}, status=503, headers={"retry-after": "7"})

    replica.respond = refuse
    async with (
        start_gateway([replica], http_port=0, retry_timeout_s=0.2) as running,
        calling(running) as session,
        session.get("/v1/models", headers={HELD_KEY: "77"}) as response,
    ):
        assert (response.status, response.headers["retry-after"]) == (503, "7")
        assert await response.json() == {"error": "loading"}
    assert len(replica.seen) > 1
    held_us = [int(request.headers.get(HELD_KEY, "0")) for request in replica.seen]
    assert 77 not in held_us  # the caller's own word does not count
    assert held_us == sorted(held_us)
    assert held_us[-1] >= 10_000  # budgets count from the arrival at the gateway


async def test_model_is_found_at_the_replica_that_has_it(start_gateway: StartGateway) -> None:
    one, two = HttpReplica("r0", ("a",)), HttpReplica("r1", ("b",))
    async with start_gateway([one, two], http_port=0) as running, calling(running) as session:
        for _ in range(3):
            for model, name in (("a", "r0"), ("b", "r1")):
                async with session.post("/v1/completions", json={"model": model}) as response:
                    assert (await response.json())["replica"] == name
        assert [len(one.seen), len(two.seen)] == [3, 3]
        nested = b"[" * 200_000  # a replica says what is wrong
        async with session.post("/v1/completions", data=nested) as response:
            assert response.status == 200


@pytest.mark.parametrize("kind", ["text/event-stream", "application/json"])
async def test_lost_replica_ends_a_begun_answer(start_gateway: StartGateway, kind: str) -> None:
    replica, other = HttpReplica("r0"), HttpReplica("r1")

    async def break_off(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": kind})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await asyncio.sleep(0.1)
        assert request.transport is not None
        request.transport.abort()
        return response

    replica.respond = other.respond = break_off
    async with start_gateway([replica, other], http_port=0) as running, calling(running) as session:
        async with session.post("/v1/completions", data=b"{}") as response:
            if kind == "application/json":
                with pytest.raises(aiohttp.ClientPayloadError):
                    await response.read()
            else:
                first, error, rest = (await response.read()).split(b"\n\n")
                assert (first, rest) == (b"data: 1", b"")
                message = json.loads(error.removeprefix(b"data: "))["error"]
                assert message["code"] == "UNAVAILABLE"
        async with session.get("/metrics") as response:
            lost = 'code="UNAVAILABLE",method="HTTP /v1/completions"} 1.0'
            assert lost in await response.text()
    assert len(replica.seen) + len(other.seen) == 1


async def test_caller_who_leaves_ends_the_call(start_gateway: StartGateway) -> None:
    replica, begun, cancelled = HttpReplica("r0"), asyncio.Event(), asyncio.Event()

    async def wait_forever(request: web.Request) -> web.StreamResponse:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError

    replica.respond = wait_forever
    async with start_gateway([replica], http_port=0) as running, calling(running) as session:
        call = asyncio.create_task(session.post("/v1/completions", data=b"{}").__aenter__())
        await begun.wait()
        call.cancel()
        async with asyncio.timeout(60):
            await cancelled.wait()


async def test_silent_replica_loses_its_requests_to_another_one(
    start_gateway: StartGateway,
) -> None:
    replicas = [HttpReplica("r0"), HttpReplica("r1")]
    silent: list[HttpReplica] = []

    async def hang_first(request: web.Request) -> web.StreamResponse:
        (replica,) = [r for r in replicas if r.seen and r.seen[-1] is request]
        if not silent:
            silent.append(replica)
            replica.silent = True
            await asyncio.Event().wait()
        return await replica.name_itself(request)

    for replica in replicas:
        replica.respond = hang_first
    async with (
        start_gateway(list(replicas), http_port=0) as running,
        calling(running) as session,
        session.post("/v1/completions", data=b"{}") as response,
    ):
        assert (await response.json())["replica"] != silent[0].name


async def test_token_and_size_are_checked_before_anything_is_forwarded(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    replica, tokens = HttpReplica("r0"), tmp_path / "tokens.yaml"
    tokens.write_text(f"tokens:\n- name: caller\n  token: {TOKEN}\n  scopes: [inference]\n")
    async with start_gateway(
        [replica], http_port=0, token_file=tokens, max_message_mb=1
    ) as running:
        async with calling(running) as session:
            async with session.get("/v1/models") as response:
                assert response.status == 401
            async with session.get("/health") as response:
                assert (response.status, await response.json()) == (200, {"serving": True})
        async with calling(running, authorization=f"Bearer {TOKEN}") as session:
            async with session.get("/v1/models") as response:
                assert response.status == 200
            async with session.post(
                "/v1/completions", data=io.BytesIO(b"x" * (1 << 20 | 1))
            ) as response:
                assert response.status == 413
    (seen,) = replica.seen
    assert seen.headers["authorization"] == f"Bearer {TOKEN}"


async def test_replica_without_http_is_named(start_gateway: StartGateway) -> None:
    replica = FakeReplica("r0")
    async with start_gateway([replica], http_port=0) as running, calling(running) as session:
        async with session.get("/v1/models") as response:
            assert response.status == 503
            message = (await response.json())["error"]["message"]
        assert f"replica {replica.address} has no HTTP port" in message


async def test_bodies_count_as_buffered_until_their_answers(start_gateway: StartGateway) -> None:
    """Bodies of HTTP and messages of gRPC share one limit."""
    replica, begun, release = HttpReplica("r0"), asyncio.Event(), asyncio.Event()

    async def wait(request: web.Request) -> web.StreamResponse:
        begun.set()
        await release.wait()
        return web.json_response({})

    replica.respond = wait
    large = b"x" * (700 << 10)
    async with (
        start_gateway([replica], http_port=0, max_buffered_mb=1) as running,
        calling(running) as session,
    ):
        first = asyncio.create_task(session.post("/v1/completions", data=large).__aenter__())
        await begun.wait()
        assert await buffered_bytes(session) == len(large)
        for body in (large, _parts(large)):
            async with session.post("/v1/completions", data=body) as response:
                assert (response.status, response.headers["retry-after"]) == (429, "1")
                error = (await response.json())["error"]
                assert error["code"] == "OVERLOADED"
                assert "buffers at most 1 MiB" in error["message"]
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await running.infer(large)
        assert failure.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await buffered_bytes(session) == len(large)
        release.set()
        async with await first as response:
            assert response.status == 200
            await response.read()
        await until_nothing_is_buffered(session)
        async with session.post("/v1/completions", data=large) as response:
            assert response.status == 200
        await until_nothing_is_buffered(session)
    assert len(replica.seen) == 2


async def _parts(body: bytes) -> AsyncIterator[bytes]:
    """Yield a body in parts, so that its length is not announced."""
    for at in range(0, len(body), 64 << 10):
        yield body[at : at + (64 << 10)]


async def until_nothing_is_buffered(session: aiohttp.ClientSession) -> None:
    """Wait until the gateway has noticed that all answers have ended."""
    async with asyncio.timeout(60):
        while await buffered_bytes(session):
            pass  # each question waits for an answer


async def buffered_bytes(session: aiohttp.ClientSession) -> float:
    """Return the bytes that the gateway says it holds."""
    async with session.get("/metrics") as response:
        (line,) = [
            line
            for line in (await response.text()).splitlines()
            if line.startswith("ladderstitch_gateway_buffered_bytes ")
        ]
    return float(line.split()[1])


async def test_gateway_on_loopback_answers_under_its_own_names(start_gateway: StartGateway) -> None:
    replica = HttpReplica("r0")
    async with (
        start_gateway([replica], http_port=0, allowed_hosts=("own.example",)) as running,
        calling(running) as session,
    ):
        for host, status in (("localhost:1", 200), ("own.example", 200), ("evil.example:80", 421)):
            for path in ("/v1/models", "/health", "/metrics"):
                async with session.get(path, headers={"host": host}) as response:
                    assert response.status == status
    assert len(replica.seen) == 2

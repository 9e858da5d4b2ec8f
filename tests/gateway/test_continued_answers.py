"""A streamed answer goes on at another replica when the one that gives it breaks."""

from __future__ import annotations

import grpc
import pytest

from ladderstitch.v1.generation_pb2 import (
    FINISH_REASON_LENGTH,
    GenerateRequest,
    GenerateResponse,
)
from tests.support.fake_replicas import (
    GENERATE,
    Answer,
    Context,
    RunningGateway,
    StartGateway,
)

REQUEST = GenerateRequest(text="x", max_tokens=6, request_id="a")


def answer_from(begin: int, end: int, received: list[GenerateRequest], *, total: int = 6) -> Answer:
    """Return an answer of tokens `begin` to `end` - 1 that then breaks unless it is complete."""

    async def answer(request: bytes, context: Context) -> None:
        received.append(GenerateRequest.FromString(request))
        for index in range(begin, end):
            response = GenerateResponse(index=index, token_id=100 + index)
            if index + 1 == total:
                response.finish_reason = FINISH_REASON_LENGTH
            await context.write(response.SerializeToString())
        if end < total:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the replica dies")

    return answer


async def ask(running: RunningGateway) -> list[int]:
    """Return the indices that a caller receives, whose tokens are checked."""
    call = running.channel.unary_stream(GENERATE)(REQUEST.SerializeToString(), timeout=300)
    found = [GenerateResponse.FromString(message) async for message in call]
    assert [response.token_id - 100 for response in found] == [r.index for r in found]
    return [response.index for response in found]


async def test_answer_goes_on_at_other_replicas(start_gateway: StartGateway) -> None:
    received: list[GenerateRequest] = []
    begins = {0: (0, 2), 2: (2, 3), 3: (3, 6)}

    async def answer(request: bytes, context: Context) -> None:
        known = len(GenerateRequest.FromString(request).answer_so_far.token_ids)
        await answer_from(*begins[known], received)(request, context)

    async with start_gateway(3) as running:
        for replica in running.replicas:
            replica.answers[GENERATE] = answer
        assert await ask(running) == list(range(6))
    first, second, third = received
    assert first == REQUEST
    assert list(second.answer_so_far.token_ids) == [100, 101]
    assert list(third.answer_so_far.token_ids) == [100, 101, 102]
    assert third.answer_so_far.first_token_us == second.answer_so_far.first_token_us > 0
    for rest in (second, third):
        rest.ClearField("answer_so_far")
        assert rest == REQUEST


async def test_replica_that_begins_again_is_not_believed(start_gateway: StartGateway) -> None:
    received: list[GenerateRequest] = []

    async def answer(request: bytes, context: Context) -> None:
        end = 2 if not received else 6
        await answer_from(0, end, received)(request, context)

    async with start_gateway(2, retry_timeout_s=0.5) as running:
        for replica in running.replicas:
            replica.answers[GENERATE] = answer
        call = running.channel.unary_stream(GENERATE)(REQUEST.SerializeToString(), timeout=300)
        for index in (0, 1):
            assert GenerateResponse.FromString(await call.read()).index == index
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call.read()
    assert failure.value.code() == grpc.StatusCode.UNAVAILABLE
    assert len(received) > 2


async def test_complete_answer_needs_no_status(start_gateway: StartGateway) -> None:
    received: list[GenerateRequest] = []

    async def answer(request: bytes, context: Context) -> None:
        await answer_from(0, 6, received)(request, context)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the replica dies")

    async with start_gateway(2) as running:
        for replica in running.replicas:
            replica.answers[GENERATE] = answer
        assert await ask(running) == list(range(6))
    assert len(received) == 1


async def test_refused_rest_ends_with_its_status(start_gateway: StartGateway) -> None:
    received: list[GenerateRequest] = []

    async def answer(request: bytes, context: Context) -> None:
        if received:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        await answer_from(0, 2, received)(request, context)

    async with start_gateway(2) as running:
        for replica in running.replicas:
            replica.answers[GENERATE] = answer
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await ask(running)
    assert failure.value.code() == grpc.StatusCode.NOT_FOUND

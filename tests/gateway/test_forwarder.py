"""What callers see of replicas that answer, refuse, break, fall silent, come and go."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from ladderstitch.api.deadlines import HELD_KEY
from ladderstitch.api.status import abort
from ladderstitch.client import RequestFailed
from ladderstitch.errors import Overloaded
from ladderstitch.gateway import replica_connection
from tests.support.fake_replicas import (
    GENERATE,
    INFER,
    LOAD,
    REFLECT,
    UPDATE,
    Context,
    FakeReplica,
    MakeFleet,
    of_queue,
)

UNAVAILABLE, INTERNAL = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL


def refusal(error: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> RequestFailed:
    return RequestFailed(error.value)


async def test_bytes_metadata_and_deadline_go_through(fleet: MakeFleet) -> None:
    async def answer(request: bytes, context: Context) -> bytes:
        await context.send_initial_metadata((("x-request-id", "7"),))
        context.set_trailing_metadata((("x-cost", "3"), ("x-cost-bin", b"\x00\xff")))
        return request[::-1]

    async with fleet(1) as running:
        running.replicas[0].answers[INFER] = answer
        payload = bytes(range(256)) * 100
        call = running.infer(
            payload, timeout=5.0, metadata=(("authorization", "Bearer t"), ("x-own", "1"))
        )
        assert await call == payload[::-1]
        assert dict(await call.initial_metadata())["x-request-id"] == "7"
        trailing = dict(await call.trailing_metadata())
    assert (trailing["x-cost"], trailing["x-cost-bin"]) == ("3", b"\x00\xff")
    ((_, metadata, remaining_s),) = running.replicas[0].asked
    assert (metadata["authorization"], metadata["x-own"]) == ("Bearer t", "1")
    assert remaining_s is not None
    assert 0 < remaining_s <= 5.1  # gRPC rounds timeouts up


async def test_no_deadline_is_no_deadline(fleet: MakeFleet) -> None:
    async with fleet(1) as running:
        await running.infer(timeout=None)
    assert running.replicas[0].asked[0][2] is None


async def test_a_status_comes_with_its_details_and_is_not_retried(fleet: MakeFleet) -> None:
    async def refuse(request: bytes, context: Context) -> None:
        await abort(context, Overloaded("not now", 0.25))

    async with fleet(2) as running:
        for replica in running.replicas:
            replica.answers[INFER] = refuse
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await running.infer()
        assert sum(running.counts) == 1
    error = refusal(failed)
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert error.retry_after_s == 0.25
    assert ("grpc-retry-pushback-ms", "250") in tuple(failed.value.trailing_metadata())


async def test_unavailable_goes_to_another(fleet: MakeFleet) -> None:
    async with fleet(2) as running:
        running.replicas[0].refuse(INFER, UNAVAILABLE)
        answers = [await running.infer(b"!") for _ in range(6)]
    assert answers == [b"r1!"] * 6
    assert running.counts[0] >= 1  # it was asked, and its refusal was nobody's


async def test_a_replica_is_told_what_was_lost_on_the_way(fleet: MakeFleet) -> None:
    async def dawdle(request: bytes, context: Context) -> None:
        await asyncio.sleep(0.1)
        await context.abort(UNAVAILABLE, "no")

    async with fleet(2) as running:
        running.replicas[0].answers[INFER] = dawdle
        for _ in range(2):
            metadata = (("x-latency-budget-ms", "500"), (HELD_KEY, "77"))
            await running.infer(timeout=3.0, metadata=metadata)
    told = [(m.get(HELD_KEY), m["x-latency-budget-ms"], s) for _, m, s in running.replicas[1].asked]
    assert {budget for _, budget, _ in told} == {"500"}  # it runs from the arrival at the gateway
    assert "77" not in {held for held, *_ in told}
    held_us, left_s = max((int(held), left) for held, _, left in told if held is not None)
    assert 100_000 <= held_us < 3_000_000
    assert left_s < 3.0


async def test_when_all_refuse_the_last_word_counts_once_time_is_up(fleet: MakeFleet) -> None:
    async with fleet(2, retry_timeout_s=0.3) as running:
        for replica in running.replicas:
            replica.refuse(INFER, UNAVAILABLE, "DRAINING: going")
        with pytest.raises(grpc.aio.AioRpcError, match="DRAINING: going"):
            await running.infer()
        assert min(running.counts) >= 2  # tried, waited, tried again


async def test_a_replica_that_breaks_loses_no_request(fleet: MakeFleet) -> None:
    started = asyncio.Event()

    async def hang(request: bytes, context: Context) -> bytes:
        started.set()
        await asyncio.sleep(60)
        return b""

    async with fleet(2) as running:
        first, second = running.replicas
        second.state.waits[0].wait_us = 10**6
        first.answers[INFER] = hang
        await running.until(
            lambda: running.gateway.fleet.links[second.address].view.report.waits_s[0] > 0
        )
        asking = asyncio.ensure_future(running.infer(b"!"))
        await started.wait()
        await first.stop()
        assert await asking == b"r1!"


async def test_a_silent_replica_is_left_and_what_it_has_goes_to_another(
    fleet: MakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_connection, "SILENCE_S", 0.4)
    started = asyncio.Event()

    async def hang(request: bytes, context: Context) -> bytes:
        started.set()
        await asyncio.sleep(60)
        return b""

    async with fleet(2) as running:
        first, second = running.replicas
        second.state.waits[0].wait_us = 10**6
        first.answers[INFER] = hang
        await running.until(
            lambda: running.gateway.fleet.links[second.address].view.report.waits_s[0] > 0
        )
        asking = asyncio.ensure_future(running.infer(b"!"))
        await started.wait()
        first.mute = True
        assert await asking == b"r1!"
        assert [each.address for each in running.gateway.fleet.serving] == [second.address]
        first.mute = False
        first.answers.clear()
        await running.until(lambda: len(running.gateway.fleet.serving) == 2)


async def test_one_that_fails_again_and_again_gets_a_rest(fleet: MakeFleet) -> None:
    async with fleet(2) as running:
        sick = running.replicas[0]
        sick.refuse(INFER, INTERNAL)
        ends = await asyncio.gather(*(running.infer() for _ in range(30)), return_exceptions=True)
        ends += [await running.infer() for _ in range(10)]
    failures = [end for end in ends if isinstance(end, grpc.aio.AioRpcError)]
    assert {failure.code() for failure in failures} == {INTERNAL}  # not retried: it may be theirs
    assert sick.count == len(failures)
    assert replica_connection.FAILURES <= sick.count <= 15


async def test_resting_replicas_are_better_than_none(fleet: MakeFleet) -> None:
    async with fleet(1) as running:
        running.replicas[0].refuse(INFER, INTERNAL)
        for _ in range(replica_connection.FAILURES):
            with pytest.raises(grpc.aio.AioRpcError):
                await running.infer()
        running.replicas[0].answers.clear()
        assert await running.infer(b"!") == b"r0!"


async def test_a_model_that_only_one_has_is_found(fleet: MakeFleet) -> None:
    one, two, both = FakeReplica("r0"), FakeReplica("r1"), FakeReplica("r2", ("tiny", "other"))
    for replica in (one, two):
        replica.refuse(INFER, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND: no model 'other'")
    async with fleet([one, two, both]) as running:
        assert {await running.infer(b"!") for _ in range(6)} == {b"r2!"}
        assert one.count + two.count <= 6  # replicas alike are not asked the same twice
        both.refuse(INFER, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND: nowhere")
        with pytest.raises(grpc.aio.AioRpcError, match="MODEL_NOT_FOUND"):
            await running.infer(b"!")


async def test_slack_decides(fleet: MakeFleet) -> None:
    async with fleet(2) as running:
        busy = running.replicas[0]
        busy.state.waits[0].wait_us = 5 * 10**6
        links = running.gateway.fleet.links
        await running.until(lambda: links[busy.address].view.report.waits_s[0] == 5)
        assert {await running.infer() for _ in range(8)} == {b"r1"}


async def test_requests_wait_for_a_replica_to_come(fleet: MakeFleet) -> None:
    late = FakeReplica("late")
    late.state.serving = False
    async with fleet([late]) as running:
        asking = asyncio.ensure_future(running.infer(b"!"))
        await asyncio.wait([asking], timeout=0.2)
        assert not asking.done()
        late.state.serving = True
        assert await asking == b"late!"


async def test_nobody_there_is_said_plainly(fleet: MakeFleet) -> None:
    async with fleet(0, retry_timeout_s=0.1) as running:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await running.infer()
    assert (refusal(failed).code, refusal(failed).reason) == (UNAVAILABLE, "NOT_READY")


async def test_more_than_memory_is_meant_for_is_refused(fleet: MakeFleet) -> None:
    slow = FakeReplica("slow")
    gate = asyncio.Event()

    async def wait(request: bytes, context: Context) -> bytes:
        await gate.wait()
        return b"done"

    slow.answers[INFER] = wait
    async with fleet([slow], max_buffered_mb=1) as running:
        half = bytes(600_000)
        first = asyncio.ensure_future(running.infer(half))
        await asyncio.wait([first], timeout=0.3)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await running.infer(half)
        gate.set()
        assert await first == b"done"
    assert refusal(failed).reason == "OVERLOADED"


async def test_the_caller_leaves_and_the_replica_is_told(fleet: MakeFleet) -> None:
    started, left = asyncio.Event(), asyncio.Event()

    async def wait(request: bytes, context: Context) -> bytes:
        started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            left.set()
            raise
        return b""

    async with fleet(1) as running:
        running.replicas[0].answers[INFER] = wait
        call = running.infer()
        asking = asyncio.ensure_future(call)
        await started.wait()
        call.cancel()
        await asyncio.wait_for(left.wait(), 5)
        await asyncio.gather(asking, return_exceptions=True)
        (entry,) = running.gateway.fleet.links.values()
        await asyncio.wait_for(entry.idle.wait(), 5)
        assert running.replicas[0].count == 1


def words(texts: list[str], end: grpc.StatusCode | None = None) -> Any:
    async def stream(request: bytes, context: Context) -> None:
        for text in texts:
            await context.write(text.encode())
        if end is not None:
            await context.abort(end, "broken")

    return stream


async def test_a_stream_comes_piece_by_piece(fleet: MakeFleet) -> None:
    async with fleet(1) as running:
        running.replicas[0].answers[GENERATE] = words(["a", "b", "c"])
        call = running.channel.unary_stream(GENERATE)(b"", timeout=5)
        assert [piece async for piece in call] == [b"a", b"b", b"c"]


async def test_a_stream_that_has_not_begun_goes_to_another(fleet: MakeFleet) -> None:
    async with fleet(2) as running:
        running.replicas[0].answers[GENERATE] = words([], UNAVAILABLE)
        running.replicas[1].answers[GENERATE] = words(["a", "b"])
        for _ in range(2):
            call = running.channel.unary_stream(GENERATE)(b"", timeout=5)
            assert [piece async for piece in call] == [b"a", b"b"]


async def test_a_stream_that_has_begun_ends_with_the_replicas_status(fleet: MakeFleet) -> None:
    async with fleet(2) as running:
        for replica in running.replicas:
            replica.answers[GENERATE] = words(["a"], UNAVAILABLE)
        call = running.channel.unary_stream(GENERATE)(b"", timeout=5)
        assert await call.read() == b"a"
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call.read()
        assert failed.value.code() == UNAVAILABLE
        assert sum(running.counts) == 1


async def test_reflection_is_a_replicas(fleet: MakeFleet) -> None:
    async with fleet(1) as running:
        call = running.channel.stream_stream(REFLECT)(timeout=5)
        for text in (b"x", b"y"):
            await call.write(text)
            assert await call.read() == b"r0" + text
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


@pytest.mark.parametrize("method", [UPDATE, LOAD])
async def test_changes_go_to_every_replica(fleet: MakeFleet, method: str) -> None:
    async with fleet(3) as running:
        await running.channel.unary_unary(method)(b"!", timeout=5)
        assert running.counts == [1, 1, 1]
        running.replicas[1].refuse(method, grpc.StatusCode.INVALID_ARGUMENT, "BAD_INPUT: x")
        with pytest.raises(grpc.aio.AioRpcError, match="BAD_INPUT: x"):
            await running.channel.unary_unary(method)(b"!", timeout=5)
        assert running.counts == [2, 2, 2]


async def test_what_is_no_method_is_unimplemented(fleet: MakeFleet) -> None:
    async with fleet(1) as running:
        for method in ("/ladderstitch.v1.InferenceService/Nothing", "/some.Service/Infer"):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await running.channel.unary_unary(method)(b"", timeout=5)
            assert failed.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert running.replicas[0].count == 0


async def test_one_that_leaves_finishes_and_one_that_comes_is_found(fleet: MakeFleet) -> None:
    queue: asyncio.Queue[frozenset[str]] = asyncio.Queue()
    started, gate = asyncio.Event(), asyncio.Event()

    async def wait(request: bytes, context: Context) -> bytes:
        started.set()
        await gate.wait()
        return b"finished"

    old, new = FakeReplica("old"), FakeReplica("new")
    old.answers[INFER] = wait
    async with fleet([old, new], discovery=of_queue(queue)) as running:
        await queue.put(frozenset({old.address}))
        asking = asyncio.ensure_future(running.infer())
        await started.wait()
        await queue.put(frozenset({new.address}))
        assert await running.infer() == b"new"
        gate.set()
        assert await asking == b"finished"
        assert running.counts == [1, 1]

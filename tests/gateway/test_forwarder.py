"""What callers see while replicas answer, fail, break, fall silent, are added or removed."""

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
from ladderstitch.gateway.forwarder import MODEL_READY
from ladderstitch.oip.grpc_service_pb2 import (
    ModelInferRequest,
    ModelReadyRequest,
    ModelReadyResponse,
)
from tests.support.fake_replicas import (
    GENERATE,
    INFER,
    LOAD,
    REFLECT,
    STREAM,
    UPDATE,
    Context,
    FakeReplica,
    StartGateway,
    discover_from_queue,
)

UNAVAILABLE, INTERNAL = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL


def parse_failure(error: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> RequestFailed:
    """Return the error that a client would raise."""
    return RequestFailed(error.value)


async def test_forward_passes_bytes_metadata_and_deadline(start_gateway: StartGateway) -> None:
    async def answer(request: bytes, context: Context) -> bytes:
        await context.send_initial_metadata((("x-request-id", "7"),))
        context.set_trailing_metadata((("x-cost", "3"), ("x-cost-bin", b"\x00\xff")))
        return request[::-1]

    async with start_gateway(1) as running:
        running.replicas[0].answers[INFER] = answer
        payload = bytes(range(256)) * 100
        call = running.infer(
            payload, timeout=5.0, metadata=(("authorization", "Bearer t"), ("x-own", "1"))
        )
        assert await call == payload[::-1]
        assert dict(await call.initial_metadata())["x-request-id"] == "7"
        trailing = dict(await call.trailing_metadata())
    assert (trailing["x-cost"], trailing["x-cost-bin"]) == ("3", b"\x00\xff")
    ((_, metadata, remaining_s),) = running.replicas[0].received
    assert (metadata["authorization"], metadata["x-own"]) == ("Bearer t", "1")
    assert remaining_s is not None
    assert 0 < remaining_s <= 5.1  # gRPC rounds timeouts up


async def test_forward_without_deadline_sets_none(start_gateway: StartGateway) -> None:
    async with start_gateway(1) as running:
        await running.infer(timeout=None)
    assert running.replicas[0].received[0][2] is None


async def test_rejection_keeps_its_details_and_is_not_retried(start_gateway: StartGateway) -> None:
    async def reject(request: bytes, context: Context) -> None:
        await abort(context, Overloaded("not now", 0.25))

    async with start_gateway(2) as running:
        for replica in running.replicas:
            replica.answers[INFER] = reject
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await running.infer()
        assert sum(running.counts) == 1
    error = parse_failure(failed)
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert error.retry_after_s == 0.25
    assert ("grpc-retry-pushback-ms", "250") in tuple(failed.value.trailing_metadata())


async def test_unavailable_is_retried_on_another_replica(start_gateway: StartGateway) -> None:
    async with start_gateway(2) as running:
        running.replicas[0].fail(INFER, UNAVAILABLE)
        answers = [await running.infer(b"!") for _ in range(6)]
    assert answers == [b"r1!"] * 6
    assert running.counts[0] >= 1  # it was called, and no caller got its status


async def test_retry_reports_the_time_spent_in_the_gateway(start_gateway: StartGateway) -> None:
    async def fail_late(request: bytes, context: Context) -> None:
        await asyncio.sleep(0.5)
        await context.abort(UNAVAILABLE, "no")

    async with start_gateway(2) as running:
        running.replicas[0].answers[INFER] = fail_late
        for _ in range(2):
            metadata = (("x-latency-budget-ms", "500"), (HELD_KEY, "77"))
            await running.infer(timeout=9.0, metadata=metadata)
    received = [
        (metadata.get(HELD_KEY), metadata["x-latency-budget-ms"], remaining_s)
        for _, metadata, remaining_s in running.replicas[1].received
    ]
    assert {budget for _, budget, _ in received} == {"500"}  # counted from arrival at the gateway
    assert "77" not in {held for held, *_ in received}
    held_us, left_s = max((int(held), left) for held, _, left in received if held is not None)
    assert 100_000 <= held_us < 9_000_000
    assert left_s < 9.0


async def test_retry_timeout_returns_the_last_status(start_gateway: StartGateway) -> None:
    async with start_gateway(2, retry_timeout_s=1.0) as running:
        for replica in running.replicas:
            replica.fail(INFER, UNAVAILABLE, "DRAINING: stopping")
        with pytest.raises(grpc.aio.AioRpcError, match="DRAINING: stopping"):
            await running.infer()
        assert min(running.counts) >= 2  # tried, waited, tried again


async def test_broken_replica_loses_no_request(start_gateway: StartGateway) -> None:
    started = asyncio.Event()

    async def hang(request: bytes, context: Context) -> bytes:
        started.set()
        await asyncio.sleep(600)
        return b""

    async with start_gateway(2) as running:
        first, second = running.replicas
        second.state.waits[0].wait_us = 10**6
        first.answers[INFER] = hang
        await running.wait_until(lambda: running.reported_wait_s(second) > 0)
        asking = asyncio.ensure_future(running.infer(b"!"))
        await started.wait()
        await first.stop()
        assert await asking == b"r1!"


async def test_silent_replica_is_dropped_and_its_calls_retried(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_connection, "REPORT_TIMEOUT_S", 0.4)
    started = asyncio.Event()

    async def hang(request: bytes, context: Context) -> bytes:
        started.set()
        await asyncio.sleep(600)
        return b""

    async with start_gateway(2) as running:
        first, second = running.replicas
        second.state.waits[0].wait_us = 10**6
        first.answers[INFER] = hang
        await running.wait_until(lambda: running.reported_wait_s(second) > 0)
        asking = asyncio.ensure_future(running.infer(b"!"))
        await started.wait()
        first.silent = True
        assert await asking == b"r1!"
        assert [each.address for each in running.gateway.pool.serving] == [second.address]
        first.silent = False
        first.answers.clear()
        await running.wait_until(lambda: len(running.gateway.pool.serving) == 2)


async def test_replica_that_keeps_failing_is_ejected(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("EJECTION_S", "MAX_EJECTION_S"):  # longer than the test on any machine
        monkeypatch.setattr(replica_connection, name, 300.0)
    async with start_gateway(2) as running:
        failing = running.replicas[0]
        failing.fail(INFER, INTERNAL)
        ends = await asyncio.gather(*(running.infer() for _ in range(30)), return_exceptions=True)
        ends += [await running.infer() for _ in range(10)]
    failures = [end for end in ends if isinstance(end, grpc.aio.AioRpcError)]
    assert {failure.code() for failure in failures} == {INTERNAL}  # not retried
    assert failing.count == len(failures)
    assert replica_connection.FAILURES_TO_EJECT <= failing.count <= 15


async def test_ejected_replica_is_used_if_no_other_serves(start_gateway: StartGateway) -> None:
    async with start_gateway(1) as running:
        running.replicas[0].fail(INFER, INTERNAL)
        for _ in range(replica_connection.FAILURES_TO_EJECT):
            with pytest.raises(grpc.aio.AioRpcError):
                await running.infer()
        running.replicas[0].answers.clear()
        assert await running.infer(b"!") == b"r0!"


async def test_not_found_is_retried_where_other_models_are(start_gateway: StartGateway) -> None:
    one, two, both = FakeReplica("r0"), FakeReplica("r1"), FakeReplica("r2", ("tiny", "other"))
    for replica in (one, two):
        replica.fail(INFER, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND: no model 'other'")
    async with start_gateway([one, two, both]) as running:
        assert {await running.infer(b"!") for _ in range(6)} == {b"r2!"}
        assert one.count + two.count <= 6  # only one of the replicas with the same models is asked
        both.fail(INFER, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND: nowhere")
        with pytest.raises(grpc.aio.AioRpcError, match="MODEL_NOT_FOUND"):
            await running.infer(b"!")


async def test_requests_go_to_the_replica_with_most_slack(start_gateway: StartGateway) -> None:
    async with start_gateway(2) as running:
        busy = running.replicas[0]
        busy.state.waits[0].wait_us = 5 * 10**6
        await running.wait_until(lambda: running.reported_wait_s(busy) == 5)
        assert {await running.infer() for _ in range(8)} == {b"r1"}


async def test_request_without_replica_waits_for_one(start_gateway: StartGateway) -> None:
    late = FakeReplica("late")
    late.state.serving = False
    async with start_gateway([late]) as running:
        asking = asyncio.ensure_future(running.infer(b"!"))
        await asyncio.wait([asking], timeout=0.2)
        assert not asking.done()
        late.state.serving = True
        assert await asking == b"late!"


async def test_no_replica_within_timeout_is_not_ready(start_gateway: StartGateway) -> None:
    async with start_gateway(0, retry_timeout_s=0.1) as running:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await running.infer()
    assert (parse_failure(failed).code, parse_failure(failed).reason) == (UNAVAILABLE, "NOT_READY")


async def test_requests_beyond_buffer_limit_are_rejected(start_gateway: StartGateway) -> None:
    slow = FakeReplica("slow")
    started, gate = asyncio.Event(), asyncio.Event()

    async def wait(request: bytes, context: Context) -> bytes:
        started.set()
        await gate.wait()
        return b"done"

    slow.answers[INFER] = wait
    async with start_gateway([slow], max_buffered_mb=1) as running:
        half = bytes(600_000)
        first = asyncio.ensure_future(running.infer(half))
        await started.wait()
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await running.infer(half)
        gate.set()
        assert await first == b"done"
    assert parse_failure(failed).reason == "OVERLOADED"


async def test_caller_cancels_and_the_replica_is_cancelled(start_gateway: StartGateway) -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def wait(request: bytes, context: Context) -> bytes:
        started.set()
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return b""

    async with start_gateway(1) as running:
        running.replicas[0].answers[INFER] = wait
        call = running.infer()
        asking = asyncio.ensure_future(call)
        await started.wait()
        call.cancel()
        await asyncio.wait_for(cancelled.wait(), 300)
        await asyncio.gather(asking, return_exceptions=True)
        (connection,) = running.gateway.pool.replicas.values()
        await asyncio.wait_for(connection.idle.wait(), 300)
        assert running.replicas[0].count == 1


def stream_texts(texts: list[str], end: grpc.StatusCode | None = None) -> Any:
    """Return an answer that writes the texts, and ends with a status."""

    async def stream(request: bytes, context: Context) -> None:
        for text in texts:
            await context.write(text.encode())
        if end is not None:
            await context.abort(end, "broken")

    return stream


async def test_stream_forwards_each_message(start_gateway: StartGateway) -> None:
    async with start_gateway(1) as running:
        running.replicas[0].answers[GENERATE] = stream_texts(["a", "b", "c"])
        call = running.channel.unary_stream(GENERATE)(b"", timeout=300)
        assert [piece async for piece in call] == [b"a", b"b", b"c"]


async def test_stream_that_has_not_started_is_retried(start_gateway: StartGateway) -> None:
    async with start_gateway(2) as running:
        running.replicas[0].answers[GENERATE] = stream_texts([], UNAVAILABLE)
        running.replicas[1].answers[GENERATE] = stream_texts(["a", "b"])
        for _ in range(2):
            call = running.channel.unary_stream(GENERATE)(b"", timeout=300)
            assert [piece async for piece in call] == [b"a", b"b"]


async def test_stream_that_has_started_ends_with_its_status(start_gateway: StartGateway) -> None:
    async with start_gateway(2) as running:
        for replica in running.replicas:
            replica.answers[GENERATE] = stream_texts(["a"], UNAVAILABLE)
        call = running.channel.unary_stream(GENERATE)(b"", timeout=300)
        assert await call.read() == b"a"
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call.read()
        assert failed.value.code() == UNAVAILABLE
        assert sum(running.counts) == 1


async def test_reflection_is_forwarded_both_ways(start_gateway: StartGateway) -> None:
    async with start_gateway(1) as running:
        call = running.channel.stream_stream(REFLECT)(timeout=300)
        for text in (b"x", b"y"):
            await call.write(text)
            assert await call.read() == b"r0" + text
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


@pytest.mark.parametrize("method", [UPDATE, LOAD])
async def test_admin_change_goes_to_every_replica(start_gateway: StartGateway, method: str) -> None:
    async with start_gateway(3) as running:
        await running.channel.unary_unary(method)(b"!", timeout=300)
        assert running.counts == [1, 1, 1]
        running.replicas[1].fail(method, grpc.StatusCode.INVALID_ARGUMENT, "BAD_INPUT: x")
        with pytest.raises(grpc.aio.AioRpcError, match="BAD_INPUT: x"):
            await running.channel.unary_unary(method)(b"!", timeout=300)
        assert running.counts == [2, 2, 2]


async def test_unknown_method_is_unimplemented(start_gateway: StartGateway) -> None:
    async with start_gateway(1) as running:
        for method in ("/ladderstitch.v1.InferenceService/Nothing", "/some.Service/Infer"):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await running.channel.unary_unary(method)(b"", timeout=300)
            assert failed.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert running.replicas[0].count == 0


async def test_removed_replica_finishes_and_added_one_is_used(start_gateway: StartGateway) -> None:
    queue: asyncio.Queue[frozenset[str]] = asyncio.Queue()
    started, gate = asyncio.Event(), asyncio.Event()

    async def wait(request: bytes, context: Context) -> bytes:
        started.set()
        await gate.wait()
        return b"finished"

    old, new = FakeReplica("old"), FakeReplica("new")
    old.answers[INFER] = wait
    async with start_gateway([old, new], discovery=discover_from_queue(queue)) as running:
        await queue.put(frozenset({old.address}))
        asking = asyncio.ensure_future(running.infer())
        await started.wait()
        await queue.put(frozenset({new.address}))
        assert await running.infer() == b"new"
        gate.set()
        assert await asking == b"finished"
        assert running.counts == [1, 1]


async def test_long_status_of_a_replica_arrives_bounded(start_gateway: StartGateway) -> None:
    """A replica of another version may send longer ones than callers can receive."""
    code = grpc.StatusCode.FAILED_PRECONDITION
    trailer = (("x-note", "n" * 3000), ("x-more", "m" * 3000))
    async with start_gateway(1) as running:
        for method in (INFER, GENERATE, UPDATE, LOAD):
            running.replicas[0].fail(method, code, "é" * 700, trailing_metadata=trailer)
            for _ in range(6):
                if method == GENERATE:
                    call = running.channel.unary_stream(method)(b"", timeout=300)
                else:
                    call = running.channel.unary_unary(method)(b"", timeout=300)
                assert await call.code() == code
                assert "characters left out" in await call.details()
                assert [key for key, _ in await call.trailing_metadata()] == ["x-note"]


async def test_model_ready_is_asked_where_the_model_is(start_gateway: StartGateway) -> None:
    """A replica that knows a model without having it says that it is not ready."""

    async def answer_false(request: bytes, context: Context) -> bytes:
        return b""

    async def answer_true(request: bytes, context: Context) -> bytes:
        return ModelReadyResponse(ready=True).SerializeToString()

    one, two = FakeReplica("r0"), FakeReplica("r1", ("tiny", "other"))
    one.answers[MODEL_READY], two.answers[MODEL_READY] = answer_false, answer_true
    async with start_gateway([one, two]) as running:
        ready = running.channel.unary_unary(MODEL_READY)
        request = ModelReadyRequest(name="other").SerializeToString()
        assert {await ready(request, timeout=300) for _ in range(8)} == {b"\x08\x01"}
        assert one.count == 0
        request = ModelReadyRequest(name="neither").SerializeToString()
        assert await ready(request, timeout=300) in (b"", b"\x08\x01")
        await ready(b"\xff\xff", timeout=300)


async def test_stream_goes_to_a_replica_with_its_first_model(start_gateway: StartGateway) -> None:
    replicas = [FakeReplica("r0"), FakeReplica("r1", ("text",)), FakeReplica("r2")]
    async with start_gateway(replicas) as running:
        for name, answers in (("text", {b"r1"}), ("tiny", {b"r0", b"r2"}), ("no", None)):
            request = ModelInferRequest(model_name=name).SerializeToString()
            for _ in range(4):
                call = running.channel.stream_stream(STREAM)(timeout=300)
                await call.write(request)
                answer = await call.read()
                assert answer.endswith(request)
                assert answers is None or answer.removesuffix(request) in answers
                await call.done_writing()
                assert await call.read() is grpc.aio.EOF


async def test_stream_without_a_request_ends(start_gateway: StartGateway) -> None:
    async with start_gateway(1) as running:
        call = running.channel.stream_stream(STREAM)(timeout=300)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF

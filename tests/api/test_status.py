"""How errors become statuses: their size, and which exceptions end a request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from ladderstitch.api.listener import ListenerConfig
from ladderstitch.api.oip.service import OipService
from ladderstitch.api.server import Server
from ladderstitch.api.status import as_request_error
from ladderstitch.errors import MAX_MESSAGE_BYTES, InvalidArgument, RequestError, shorten
from ladderstitch.hosting.registry import AdminActions, ModelRegistry
from ladderstitch.oip import grpc_service_pb2 as pb
from ladderstitch.oip import grpc_service_pb2_grpc


class RustPanic(BaseException):
    """An exception like those of extension modules, which derive from `BaseException` alone."""


FAULTS: dict[str, BaseException] = {
    "value": ValueError("boom"),
    "memory": MemoryError(),
    "recursion": RecursionError(),
    "disk": OSError(28, "No space left on device"),
    "assertion": AssertionError(),
    "timeout": TimeoutError(),
    "group": ExceptionGroup("two", [ValueError(), KeyError()]),
    "group of one": ExceptionGroup("one", [InvalidArgument("images", "expected others")]),
    "nested": BaseExceptionGroup("outer", [BaseExceptionGroup("inner", [RustPanic()])]),
    "panic": RustPanic("panicked"),
    "cancelled": asyncio.CancelledError(),
    "stop": StopAsyncIteration(),
    "generator": StopIteration(),
    "request": InvalidArgument("images", "expected others"),
}


async def no_action(*_: Any) -> Any:
    raise AssertionError("these tests change nothing")


class FakeModel:
    """A model whose answers are replaced by the tests."""

    name = version = "1"


@pytest.fixture
def ended() -> asyncio.Queue[str]:
    """Return the ids of requests that have ended: by an answer, a fault or a cancellation."""
    return asyncio.Queue()


@pytest.fixture
async def faulty(monkeypatch: pytest.MonkeyPatch, ended: asyncio.Queue[str]) -> AsyncIterator[Any]:
    """Return a channel to a server whose model raises the fault that a request's id names."""

    async def generate(
        self: OipService, request: pb.ModelInferRequest, model: Any, context: Any
    ) -> AsyncIterator[pb.ModelInferResponse]:
        yield pb.ModelInferResponse(id=request.id)
        try:
            await asyncio.sleep(300 if request.id == "slow" else 0)
        finally:
            ended.put_nowait(request.id)
        if request.id in FAULTS:
            raise FAULTS[request.id]

    monkeypatch.setattr(OipService, "_generate", generate)
    registry = ModelRegistry("r", ready=True)
    registry.text_models["1"] = FakeModel()  # type: ignore[assignment] # never asked
    actions = AdminActions(no_action, no_action, no_action, no_action)
    server = Server(registry, actions, ListenerConfig())
    await server.start("127.0.0.1", 0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield channel
    await server.stop(0)


@pytest.mark.parametrize("fault", FAULTS)
async def test_exception_in_a_stream_ends_its_item_only(faulty: Any, fault: str) -> None:
    ids = [f"good {n}" for n in range(10)] + [fault] + [f"good {n}" for n in range(10, 20)]
    requests = [pb.ModelInferRequest(model_name="1", id=name) for name in ids]
    oip: Any = grpc_service_pb2_grpc.GRPCInferenceServiceStub(faulty)
    answers = [answer async for answer in oip.ModelStreamInfer(iter(requests), timeout=300)]
    failed = [answer for answer in answers if answer.error_message]
    assert [answer.infer_response.id for answer in failed] == [fault]
    answered = [a.infer_response.id for a in answers if not a.error_message]
    assert sorted(answered) == sorted(ids)
    expected = "INVALID_ARGUMENT: images" if "request" in fault or fault == "group of one" else ""
    assert failed[0].error_message.startswith(expected or "INTERNAL: internal error; error_id=")


async def test_malformed_message_in_a_stream_ends_its_item_only(faulty: Any) -> None:
    good = pb.ModelInferRequest(model_name="1", id="good").SerializeToString()
    call = faulty.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        response_deserializer=pb.ModelStreamInferResponse.FromString,
    )
    messages = [good, b"\xff\xff\xff", good, b"{}", good]
    answers = [answer async for answer in call(iter(messages), timeout=300)]
    errors = [answer.error_message for answer in answers if answer.error_message]
    assert (
        errors == ["INVALID_ARGUMENT: message: expected a ModelInferRequest, got other bytes"] * 2
    )
    assert [a.infer_response.id for a in answers if not a.error_message] == ["good"] * 3


@pytest.mark.parametrize("half_close", [False, True])
async def test_caller_that_leaves_a_stream_is_no_fault(
    faulty: Any,
    ended: asyncio.Queue[str],
    half_close: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    oip: Any = grpc_service_pb2_grpc.GRPCInferenceServiceStub(faulty)
    for _ in range(5):
        call = oip.ModelStreamInfer(timeout=300)
        for name in ("slow", "good"):
            await call.write(pb.ModelInferRequest(model_name="1", id=name))
        if half_close:
            await call.done_writing()
        assert {(await call.read()).infer_response.id for _ in range(2)} == {"slow", "good"}
        call.cancel()
    async with asyncio.timeout(300):
        assert sorted([await ended.get() for _ in range(10)]) == 5 * ["good"] + 5 * ["slow"]
    assert "error_id" not in caplog.text
    assert not [r for r in caplog.records if r.exc_info]


async def test_cancellation_of_the_call_is_no_fault_of_the_request() -> None:
    async def handle() -> RequestError:
        try:
            await asyncio.sleep(300)
        except asyncio.CancelledError as error:
            return as_request_error("test", error)
        raise AssertionError

    task = asyncio.create_task(handle())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("text", ["a", "é", "猫", "😀", "\ud800", "%", "a\n"])
@pytest.mark.parametrize("length", [1, 99, 100, 101, 150, 300, 5000, 1_000_000])
def test_shorten_keeps_both_ends_within_the_limit(text: str, length: int) -> None:
    whole = f"first{text * length}last"
    short = shorten(whole, 400)
    assert len(short.encode()) <= 400
    assert short.startswith("first")
    assert short.endswith("last")
    if len(whole.encode(errors="backslashreplace")) <= 400:
        assert short == whole.encode(errors="backslashreplace").decode()
    else:
        assert "characters left out" in short


def test_errors_bound_their_message_and_metadata() -> None:
    error = InvalidArgument("ü" * 10_000, "x" * 10_000)
    assert len(str(error).encode()) <= MAX_MESSAGE_BYTES
    assert len(error.field) < 250
    assert all(len(value.encode()) <= 200 for value in error.metadata.values())

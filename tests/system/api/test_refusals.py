"""Refusals that quote long or numerous inputs arrive as what they are, over every way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from google.rpc.status_pb2 import Status

from ladderstitch.client import infer_request
from ladderstitch.client.messages import DETAILS_KEY
from ladderstitch.gateway.config import GatewayConfig
from ladderstitch.gateway.gateway import Gateway
from ladderstitch.gateway.replica_pool import Discovery
from ladderstitch.oip import grpc_service_pb2 as pb
from ladderstitch.oip import grpc_service_pb2_grpc
from ladderstitch.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from tests.support.servers import RunningServer, pixels

TEXTS = ("x" * 3000, "x" * 12_000, "猫" * 2000, "é\n%" * 3000)
REPETITIONS = 6  # gRPC dropped statuses above its lower limit at random
Metadata = tuple[tuple[str, str | bytes], ...]


def good() -> pb.ModelInferRequest:
    """Return a request that is answered."""
    request = pb.ModelInferRequest(model_name="tiny")
    request.inputs.add(name="images", datatype="UINT8", shape=[1, 1, 8, 8])
    request.raw_input_contents.append(pixels().tobytes())
    return request


def wrong_requests(text: str) -> Iterator[tuple[str, pb.ModelInferRequest]]:
    """Yield requests that are wrong in one place by a long or numerous input."""
    request = good()
    request.inputs[0].datatype = text
    yield "datatype", request
    request = good()
    request.inputs[0].name = text
    yield "name of an input", request
    request = good()
    for n in range(300):
        request.inputs.add(name=f"{n}{text[:100]}")
    yield "inputs", request
    request = good()
    request.inputs[0].shape[:] = [2**40] * 4000
    yield "shape", request
    request = good()
    request.outputs.add(name=text)
    yield "name of an output", request
    request = good()
    request.outputs.add(name="logits").parameters[text].int64_param = 1
    yield "parameter of an output", request
    request = good()
    request.parameters[f"triton_{text}"].int64_param = 1
    yield "parameter", request
    request = good()
    request.parameters["min_quality"].string_param = text
    yield "value of a parameter", request
    request = good()
    request.id = text
    yield "id", request


def wrong_metadata() -> Iterator[Metadata]:
    """Yield metadata that are wrong by a long value."""
    for length in (3000, 7000, 12_000):
        yield (("x-latency-budget-ms", "x" * length),)
    yield (("x-latency-budget-ms", "~%" * 4000),)


def check(error: grpc.RpcError) -> None:
    """Check that a call ended with INVALID_ARGUMENT and complete details."""
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error.details()
    (value,) = (v for k, v in error.trailing_metadata() or () if k == DETAILS_KEY)
    status = Status.FromString(value)
    info, bad = ErrorInfo(), BadRequest()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(bad)
    assert info.reason == "INVALID_ARGUMENT"
    assert bad.field_violations[0].field == info.metadata["field"]
    assert "expected" in bad.field_violations[0].description


@pytest.fixture(params=["replica", "gateway"])
async def address(request: pytest.FixtureRequest, server: RunningServer) -> AsyncIterator[str]:
    """Return the address of a replica, and that of a gateway in front of it."""
    if request.param == "replica":
        yield server.address
        return

    async def discover() -> Discovery:
        yield frozenset({server.address})

    gateway = Gateway(GatewayConfig(port=0, metrics_port=0, drain_announce_s=0.0), discover())
    await gateway.start()
    async with asyncio.timeout(300):
        while not gateway.pool.serving:
            await gateway.pool.wait_for_change(0.05)
    yield f"127.0.0.1:{gateway.port}"
    await gateway.stop()


async def expect_refusal(call: Callable[[], Any]) -> None:
    for _ in range(REPETITIONS):
        with pytest.raises(grpc.RpcError) as refused:
            await call()
        check(refused.value)


async def test_long_inputs_of_oip_are_refused_as_invalid(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        oip: Any = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for text in TEXTS:
            for _, request in wrong_requests(text):
                await expect_refusal(lambda r=request: oip.ModelInfer(r, timeout=300))
        for metadata in wrong_metadata():
            await expect_refusal(lambda m=metadata: oip.ModelInfer(good(), metadata=m, timeout=300))
        await oip.ModelInfer(good(), timeout=300)


async def test_long_inputs_of_a_stream_are_refused_item_by_item(address: str) -> None:
    cases = [request for text in TEXTS for _, request in wrong_requests(text)]
    async with grpc.aio.insecure_channel(address) as channel:
        oip: Any = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        call = oip.ModelStreamInfer(iter([*cases, good()]), timeout=300)
        answers = [answer async for answer in call]
        errors = [answer.error_message for answer in answers if answer.error_message]
        assert len(answers) == len(cases) + 1
        assert len(errors) == len(cases)
        assert all(error.startswith("INVALID_ARGUMENT: ") for error in errors)
        assert all("expected" in error for error in errors)
        for metadata in wrong_metadata():
            call = oip.ModelStreamInfer(iter([good()]), metadata=metadata, timeout=300)
            (answer,) = [answer async for answer in call]
            assert answer.error_message.startswith(f"INVALID_ARGUMENT: {metadata[0][0]}: ")


async def test_long_inputs_of_native_calls_are_refused_as_invalid(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        native: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        request = infer_request(pixels())
        request.tensor.shape[:] = [2**40] * 4000
        await expect_refusal(lambda: native.Infer(request, timeout=300))
        request = infer_request(pixels())
        request.request_id = "猫" * 4000
        await expect_refusal(lambda: native.Infer(request, timeout=300))
        for metadata in wrong_metadata():
            request = infer_request(pixels())
            await expect_refusal(
                lambda r=request, m=metadata: native.Infer(r, metadata=m, timeout=300)
            )
        admin: Any = admin_pb2_grpc.AdminServiceStub(channel)
        for name in TEXTS:
            load = admin_pb2.LoadModelRequest(bundle=name)
            await expect_refusal(lambda r=load: admin.LoadModel(r, timeout=300))


async def test_long_model_names_are_not_found(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        oip: Any = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for text in TEXTS:
            for request in (
                pb.ModelInferRequest(model_name=text),
                pb.ModelInferRequest(model_name="tiny", model_version=text),
            ):
                with pytest.raises(grpc.RpcError) as missing:
                    await oip.ModelInfer(request, timeout=300)
                assert missing.value.code() == grpc.StatusCode.NOT_FOUND

"""NaN and infinity in FP32 inputs of the Open Inference Protocol: computed, or refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from ladderstitch.client import AsyncClient, RequestFailed
from ladderstitch.config import ServerConfig
from ladderstitch.oip import grpc_service_pb2 as pb
from ladderstitch.oip import grpc_service_pb2_grpc
from ladderstitch.replica.replica import Replica
from ladderstitch.vision.bundle import VisionBundle

BEST = 5
"""Variant of the tiny family that all requests pin."""


@asynccontextmanager
async def running(bundle: VisionBundle, **fields: Any) -> AsyncIterator[tuple[Replica, Any]]:
    """Yield a replica and a stub of the Open Inference Protocol."""
    replica = Replica(ServerConfig(bundle=bundle.path, port=0, metrics_port=0, **fields))
    await replica.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{replica.port}") as channel:
        yield replica, grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
    await replica.close()


def ask(values: np.ndarray, *outputs: str, classes: int = 0) -> pb.ModelInferRequest:
    """Return a request for the outputs of preprocessed images."""
    request = pb.ModelInferRequest(model_name="tiny")
    request.inputs.add(name="images", datatype="FP32", shape=values.shape)
    request.raw_input_contents.append(values.tobytes())
    request.parameters["variant_id"].int64_param = BEST
    for name in outputs:
        output = request.outputs.add(name=name)
        if classes:
            output.parameters["classification"].int64_param = classes
    return request


def inputs(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, 1, 8, 8)).astype(np.float32)


def logits_of(response: pb.ModelInferResponse) -> np.ndarray:
    return np.frombuffer(response.raw_output_contents[0], "<f4").reshape(-1, 4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_odd_inputs_are_computed_and_harm_no_other(
    tiny_bundle: VisionBundle, value: float
) -> None:
    model = tiny_bundle.load_model()
    odd = inputs(0)
    odd[0, 0, 3, 3] = value
    others = [inputs(seed) for seed in range(1, 9)]
    async with running(tiny_bundle) as (replica, stub):
        calls = [stub.ModelInfer(ask(images)) for images in (*others, odd)]
        *answers, answer = await asyncio.gather(*calls)
        counts = replica.registry.vision_models["tiny"].scheduler.in_flight.statistics
        assert counts.fail.count == 0
    with torch.inference_mode():
        expected = model(torch.from_numpy(np.concatenate([*others, odd])), BEST).numpy()
    np.testing.assert_allclose(logits_of(answer), expected[-1:], atol=1e-4)  # NaN equals NaN here
    assert not np.isfinite(expected[-1]).all()
    got = np.concatenate([logits_of(one) for one in answers])
    np.testing.assert_allclose(got, expected[:-1], atol=1e-4)


async def test_all_outputs_of_odd_inputs_are_answered(tiny_bundle: VisionBundle) -> None:
    odd = np.full((1, 1, 8, 8), np.inf, np.float32)
    async with running(tiny_bundle) as (_, stub):
        response = await stub.ModelInfer(ask(odd, "logits", "probabilities", "labels"))
        assert [output.name for output in response.outputs] == ["logits", "probabilities", "labels"]
        best = await stub.ModelInfer(ask(odd, "logits", classes=2))
    assert list(best.outputs[0].shape) == [1, 2]


async def test_odd_inputs_are_refused_by_the_setting(tiny_bundle: VisionBundle) -> None:
    odd = np.full((1, 1, 8, 8), np.nan, np.float32)
    async with running(tiny_bundle, non_finite_inputs="refuse") as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError, match=r"images\.data: expected finite") as refused:
            await stub.ModelInfer(ask(odd))
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert logits_of(await stub.ModelInfer(ask(inputs(0)))).shape == (1, 4)


async def test_native_protocol_refuses_odd_inputs_always(tiny_bundle: VisionBundle) -> None:
    odd = np.full((1, 1, 8, 8), np.nan, np.float32)
    async with (
        running(tiny_bundle) as (replica, _),
        AsyncClient(f"127.0.0.1:{replica.port}") as client,
    ):
        with pytest.raises(RequestFailed, match=r"tensor\.data: expected finite numbers"):
            await client.predict(odd)

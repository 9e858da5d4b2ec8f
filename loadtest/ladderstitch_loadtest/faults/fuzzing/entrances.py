"""The entrances of a server with an image model and a language model, with valid requests."""

from __future__ import annotations

from typing import Any

import numpy as np
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from ladderstitch.oip import grpc_service_pb2 as oip
from ladderstitch.v1 import generation_pb2, inference_pb2
from ladderstitch_loadtest.faults.fuzzing.cases import Entrance, Protocol
from ladderstitch_loadtest.faults.fuzzing.http_answers import check_completion
from ladderstitch_loadtest.faults.fuzzing.image_files import seed_files
from ladderstitch_loadtest.faults.fuzzing.rpc_answers import (
    check_generate,
    check_infer,
    check_model_infer,
    check_stream_infer,
    expect_one,
)
from ladderstitch_loadtest.faults.fuzzing.verdict import UNKNOWN_METHOD

IMAGES, TEXT = "fashion-mnist", "tiny"
"""Names of the models that the server has."""
NATIVE, OIP = "/ladderstitch.v1.", "/inference.GRPCInferenceService/"
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 1, 28, 28)).astype(np.uint8)
SHAPE = (1, 1, 28, 28)


def all_entrances() -> tuple[Entrance, ...]:
    """Return all entrances."""
    return (*_native(), *_oip(), *_oip_descriptions(), *_http())


def _native() -> list[Entrance]:
    service = NATIVE + "InferenceService/"
    named = [inference_pb2.GetModelRequest(model_name=name) for name in (IMAGES, TEXT, "")]
    budget = inference_pb2.CheckBudgetRequest(
        model_name=IMAGES, latency_budget_us=9000, min_quality=0.5
    )
    return [
        Entrance(
            "Infer",
            Protocol.UNARY,
            service + "Infer",
            [*_infer_requests(), infer_file(seed_files()[0]), infer_file(seed_files()[3])],
            check_infer,
            inference_pb2.InferRequest,
            infer_file,
            weight=6,
        ),
        Entrance(
            "Generate",
            Protocol.SERVER_STREAM,
            NATIVE + "GenerationService/Generate",
            _generate_requests(),
            check_generate,
            generation_pb2.GenerateRequest,
            weight=6,
        ),
        _simple("GetModel", service, named, inference_pb2.GetModelResponse),
        _simple("CheckBudget", service, [budget], inference_pb2.CheckBudgetResponse),
        _simple(
            "ListModels",
            service,
            [inference_pb2.ListModelsRequest()],
            inference_pb2.ListModelsResponse,
        ),
        _simple(
            "Check",
            "/grpc.health.v1.Health/",
            [health_pb2.HealthCheckRequest(service=name) for name in ("", NATIVE[1:-1])],
            health_pb2.HealthCheckResponse,
        ),
        Entrance(
            UNKNOWN_METHOD,
            Protocol.UNARY,
            service + "Train",
            _infer_requests(),
            check_infer,
            inference_pb2.InferRequest,
        ),
    ]


def _simple(name: str, service: str, seeds: list[Any], response: type[Message]) -> Entrance:
    method = service + name
    return Entrance(name, Protocol.UNARY, method, seeds, expect_one(response), type(seeds[0]))


def _infer_requests() -> list[Message]:
    tensor = inference_pb2.Tensor(
        data_type=inference_pb2.DATA_TYPE_UINT8, shape=PIXELS.shape, data=PIXELS.tobytes()
    )
    floats = np.random.default_rng(1).normal(size=SHAPE).astype("<f4")
    preprocessed = inference_pb2.Tensor(
        data_type=inference_pb2.DATA_TYPE_FP32, shape=SHAPE, data=floats.tobytes()
    )
    return [
        inference_pb2.InferRequest(model_name=IMAGES, tensor=tensor, request_id="a"),
        inference_pb2.InferRequest(
            model_name=IMAGES,
            model_version="1",
            tensor=preprocessed,
            latency_budget_us=500_000,
            min_quality=0.1,
            priority=7,
        ),
        inference_pb2.InferRequest(model_name=IMAGES, tensor=preprocessed, variant_id=0),
    ]


def infer_file(file: bytes) -> inference_pb2.InferRequest:
    """Return a request of `Infer` with an encoded image."""
    return inference_pb2.InferRequest(model_name=IMAGES, encoded_image=file, request_id="file")


def _generate_requests() -> list[generation_pb2.GenerateRequest]:
    request = generation_pb2.GenerateRequest
    return [
        request(model_name=TEXT, text="The bicycle", max_tokens=3, request_id="g"),
        request(
            model_name=TEXT,
            text="a b c",
            max_tokens=6,
            temperature=0.8,
            top_k=20,
            top_p=0.9,
            seed=7,
            stop=["x", "stop"],
            logprobs=3,
        ),
        request(
            model_name=TEXT,
            tokens=generation_pb2.TokenIds(ids=[1, 2, 3, 4]),
            max_tokens=2,
            latency_budget_us=2_000_000,
            first_token_budget_us=1_000_000,
            token_budget_us=500_000,
            variant_id=0,
        ),
    ]


def _oip() -> list[Entrance]:
    images = [*_oip_images(), oip_file(seed_files()[0])]
    return [
        Entrance(
            "ModelInfer",
            Protocol.UNARY,
            OIP + "ModelInfer",
            images,
            check_model_infer,
            oip.ModelInferRequest,
            oip_file,
            weight=5,
        ),
        Entrance(
            "ModelStreamInfer",
            Protocol.BIDIRECTIONAL,
            OIP + "ModelStreamInfer",
            [*images, *_oip_texts()],
            check_stream_infer,
            oip.ModelInferRequest,
            oip_file,
            weight=5,
        ),
    ]


def _oip_images() -> list[oip.ModelInferRequest]:
    raw = oip.ModelInferRequest(model_name=IMAGES, id="raw", raw_input_contents=[PIXELS.tobytes()])
    raw.inputs.add(name="images", datatype="UINT8", shape=PIXELS.shape)
    raw.parameters["latency_budget_us"].int64_param = 800_000
    raw.outputs.add(name="probabilities")
    raw.outputs.add(name="labels")
    typed = oip.ModelInferRequest(model_name=IMAGES, id="typed")
    tensor = typed.inputs.add(name="images", datatype="FP32", shape=SHAPE)
    tensor.contents.fp32_contents.extend([0.5] * 784)
    return [raw, typed]


def oip_file(file: bytes) -> oip.ModelInferRequest:
    """Return a request of `ModelInfer` with an encoded image."""
    request = oip.ModelInferRequest(model_name=IMAGES, id="file")
    tensor = request.inputs.add(name="images", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(file)
    return request


def _oip_texts() -> list[oip.ModelInferRequest]:
    text = "Löwe".encode()
    raw = oip.ModelInferRequest(model_name=TEXT, id="text")
    raw.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    raw.raw_input_contents.append(len(text).to_bytes(4, "little") + text)
    raw.parameters["max_tokens"].int64_param = 3
    typed = oip.ModelInferRequest(model_name=TEXT, id="sampled")
    tensor = typed.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(text)
    for name, value in (("max_tokens", 4), ("top_k", 5), ("seed", 3)):
        typed.parameters[name].int64_param = value
    typed.parameters["temperature"].double_param = 0.7
    return [raw, typed]


def _oip_descriptions() -> list[Entrance]:
    models = (IMAGES, TEXT)
    seeds: dict[str, list[Any]] = {
        "ServerLive": [oip.ServerLiveRequest()],
        "ServerReady": [oip.ServerReadyRequest()],
        "ServerMetadata": [oip.ServerMetadataRequest()],
        "ModelReady": [oip.ModelReadyRequest(name=name, version="1") for name in models],
        "ModelMetadata": [oip.ModelMetadataRequest(name=name) for name in models],
        "ModelConfig": [oip.ModelConfigRequest(name=name) for name in models],
        "ModelStatistics": [oip.ModelStatisticsRequest(name=name) for name in (IMAGES, "")],
        "RepositoryIndex": [oip.RepositoryIndexRequest(ready=True)],
    }
    return [
        _simple(name, OIP, requests, getattr(oip, f"{name}Response"))
        for name, requests in seeds.items()
    ]


def _http() -> list[Entrance]:
    completions, chats = _completion_bodies(), _chat_bodies()
    complete, chat = "/v1/completions", "/v1/chat/completions"
    return [
        Entrance("completions", Protocol.HTTP, complete, completions, check_completion, weight=6),
        Entrance("chat", Protocol.HTTP, chat, chats, check_completion, weight=6),
        Entrance("socket", Protocol.SOCKET, complete, completions[:2], check_completion, weight=2),
    ]


def _completion_bodies() -> list[dict[str, Any]]:
    return [
        {"model": TEXT, "prompt": "a b c", "max_tokens": 3},
        {"model": TEXT, "prompt": "The bicycle", "max_tokens": 4, "stream": True},
        {
            "model": TEXT,
            "prompt": [1, 2, 3],
            "max_tokens": 4,
            "temperature": 0.7,
            "top_k": 9,
            "top_p": 0.9,
            "seed": 3,
            "logprobs": 2,
            "stop": ["x", "end"],
        },
        {
            "model": TEXT,
            "prompt": ["one"],
            "max_tokens": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
            "min_quality": 0.0,
            "variant_id": 0,
        },
    ]


def _chat_bodies() -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": "short"}, {"role": "user", "content": "Hi"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    return [
        {"model": TEXT, "messages": messages, "max_tokens": 3, "temperature": 0},
        {"model": TEXT, "messages": messages, "max_completion_tokens": 4, "stream": True},
        {
            "model": TEXT,
            "messages": parts,
            "max_tokens": 3,
            "logprobs": True,
            "top_logprobs": 2,
            "seed": 1,
            "stop": "x",
            "user": "me",
        },
    ]

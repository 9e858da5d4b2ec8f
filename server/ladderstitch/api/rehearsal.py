"""Requests that a server sends to itself before it is ready, so that no caller pays for first uses.

They take the way of callers' requests: a connection, the handlers, preprocessing, the scheduler's
queue, batches on the real engine, and serialisation. A twin of the model, with a scheduler of its
own, answers them, so that no metrics, statistics or caches of the model see them.
"""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import numpy as np
from PIL import Image

from ladderstitch.api.listener import ListenerConfig
from ladderstitch.api.native.vision_models import DATATYPE_NUMBERS
from ladderstitch.api.oip.images import input_name
from ladderstitch.api.oip.inputs import bytes_contents
from ladderstitch.api.oip.text import INPUT
from ladderstitch.api.receiving import ReceiveInterceptor
from ladderstitch.api.server import add_inference_services
from ladderstitch.hosting.registry import LoadedModel, ModelRegistry, TextModel, VisionModel
from ladderstitch.oip import grpc_service_pb2, grpc_service_pb2_grpc
from ladderstitch.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)
from ladderstitch.vision.preprocessing import ImageReader

log = logging.getLogger(__name__)

REHEARSALS = 10
"""Requests of each kind of input, with budgets from none to 9 ms."""
SLOW_S = 1.0
"""Seconds after which no further request of the same kind of input is sent."""
LIMIT_S = 60.0
"""Seconds after which a server starts to answer although its rehearsal has not ended."""
PROMPTS = ("a", "The first request of a caller takes as long as the ones that follow it.")
MAX_TOKENS = 4
MAX_VARIANTS = 8
"""Variants of a language model that generate text in a rehearsal."""
NUMPY_TYPES = {"UINT8": np.uint8, "FP32": np.float32}


async def rehearse(model: LoadedModel, listener: ListenerConfig) -> None:
    """Answer some requests with a twin of a model, on a socket that only this process can open.

    The server has the limits of `listener`. A request that fails is logged, and so is a machine
    without a place for the socket: the model then answers its first callers more slowly.
    """
    registry = ModelRegistry("rehearsal", ready=True)
    registry.add(model)
    server = replace(
        listener, receive=ReceiveInterceptor(), request_log=None, auth=None
    ).create_server()
    add_inference_services(registry, server)
    try:
        with TemporaryDirectory(prefix="ladderstitch-") as folder:
            address = f"unix:{folder}/socket"
            server.add_insecure_port(address)
            await server.start()
            try:
                async with asyncio.timeout(LIMIT_S):
                    await _send_requests(model, address)
            finally:
                await server.stop(0)
    except (OSError, RuntimeError, grpc.aio.AioRpcError) as error:  # a TimeoutError is an OSError
        log.warning("the rehearsal of model=%s ended early: %s", model.name, _reason(error))


async def _send_requests(model: LoadedModel, address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        if isinstance(model, TextModel):
            await _generate(model, channel)
        else:
            await _classify(model, channel)


async def _classify(model: VisionModel, channel: grpc.aio.Channel) -> None:
    native: Any = inference_pb2_grpc.InferenceServiceStub(channel)
    oip: Any = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
    for request in _native_requests(model):
        for number in _repetitions():
            if number:
                request.latency_budget_us = 1000 * number
            await _ignoring_non_finite(native.Infer(request))
    image = grpc_service_pb2.ModelInferRequest(model_name=model.name)
    shape, datatype = (1, *model.reader.shape), model.reader.datatypes[0]
    image.inputs.add(name=input_name(model), datatype=datatype, shape=shape)
    image.raw_input_contents.append(bytes(np.zeros(shape, NUMPY_TYPES[datatype]).data))
    for _ in _repetitions():
        await _ignoring_non_finite(oip.ModelInfer(image))


def _repetitions() -> Iterator[int]:
    """Yield the numbers of the requests of one kind; fewer if they are slow, but at least one."""
    started = time.monotonic()
    for number in range(REHEARSALS):
        yield number
        if time.monotonic() - started > SLOW_S:
            return


def _native_requests(model: VisionModel) -> Iterator[inference_pb2.InferRequest]:
    """Yield a request with a black image in each format, or with zeros."""
    reader = model.reader
    if not isinstance(reader, ImageReader):
        zeros = np.zeros((1, *reader.shape), np.float32)
        data_type = DATATYPE_NUMBERS["FP32"]
        tensor = inference_pb2.Tensor(shape=zeros.shape, data_type=data_type, data=zeros.tobytes())
        yield inference_pb2.InferRequest(model_name=model.name, tensor=tensor)
        return
    for file_format in ("JPEG", "PNG"):
        file = io.BytesIO()
        Image.new(reader.target.mode, reader.shape[:0:-1]).save(file, file_format)
        yield inference_pb2.InferRequest(model_name=model.name, encoded_image=file.getvalue())


async def _ignoring_non_finite(call: Any) -> None:
    """Wait for an answer; outputs that are not finite are normal, e.g. for the norm of zeros."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        if error.code() != grpc.StatusCode.OUT_OF_RANGE:
            raise


async def _generate(model: TextModel, channel: grpc.aio.Channel) -> None:
    native: Any = generation_pb2_grpc.GenerationServiceStub(channel)
    oip: Any = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
    prompts = [text for text in PROMPTS if _fits(model, text)]
    for text in prompts:
        for variant in (None, *range(min(MAX_VARIANTS, len(model.bundle.manifest.variants)))):
            request = generation_pb2.GenerateRequest(
                model_name=model.name, text=text, max_tokens=MAX_TOKENS, variant_id=variant
            )
            async for _ in native.Generate(request):
                pass
        streamed = grpc_service_pb2.ModelInferRequest(model_name=model.name)
        streamed.inputs.add(name=INPUT, datatype="BYTES", shape=[1])
        streamed.raw_input_contents.append(bytes_contents([text.encode()]))
        streamed.parameters["max_tokens"].int64_param = MAX_TOKENS
        async for _ in oip.ModelStreamInfer(iter([streamed])):
            pass


def _fits(model: TextModel, text: str) -> bool:
    num_tokens = len(model.scheduler.tokenizer.encode(text))
    return 0 < num_tokens <= min(model.max_prompt_tokens, model.scheduler.max_tokens - MAX_TOKENS)


def _reason(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__

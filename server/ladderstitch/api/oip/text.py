"""Language models over the Open Inference Protocol: one BYTES input, one response per token.

The input is `text_input`. Each response has `text_output` (BYTES) and `token_id` (INT32) of shape
[1]. The last one has the parameter `triton_final_response`, as in Triton's decoupled models, and
the accounting of the answer.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

from ladderstitch.api.deadlines import Metadata, call_deadlines, resolve_deadlines, token_budgets
from ladderstitch.api.native.generation import DEFAULT_MAX_TOKENS, tenant_of
from ladderstitch.api.oip.inputs import (
    PLATFORM,
    bytes_elements,
    integer_parameter,
    number_parameter,
    only_input,
    read_parameters,
)
from ladderstitch.errors import InvalidArgument, RequestError
from ladderstitch.hosting.registry import TextModel
from ladderstitch.oip import grpc_service_pb2 as pb
from ladderstitch.oip import model_config_pb2
from ladderstitch.scheduling.requests import (
    GenerationRequest,
    GenerationUsage,
    Sampling,
    TokenBudget,
    TokenChunk,
)

INPUT, TEXT_OUTPUT, TOKEN_OUTPUT = "text_input", "text_output", "token_id"
TEXT_PARAMETERS = ("max_tokens", "temperature", "top_k", "top_p", "seed")
"""Parameters of text requests in addition to those of all models."""
MAX_IN_FLIGHT = 256
"""Requests of one stream that are in progress at the same time; further ones are read later."""
MAX_QUEUED_RESPONSES = 64
"""Responses of one stream that wait for the transport."""


def build_generation_request(
    request: pb.ModelInferRequest,
    model: TextModel,
    arrival: float,
    remaining_s: float | None,
    metadata: Metadata,
) -> GenerationRequest:
    """Return the request for the scheduler.

    `remaining_s` is the time from the arrival to the gRPC deadline, None without one. Raises
    `InvalidArgument` that names the wrong field.
    """
    budgets = call_deadlines(remaining_s, metadata, None)
    options = read_parameters(request, budgets, TEXT_PARAMETERS)
    deadlines = resolve_deadlines(arrival, options.budgets)
    first_token_s, per_token_s = token_budgets(metadata)
    tokens = model.tokenise(INPUT, _read_prompt(request))
    given = request.parameters
    default_max_tokens = min(DEFAULT_MAX_TOKENS, model.scheduler.max_tokens - len(tokens))
    return GenerationRequest(
        tokens=tokens,
        arrival=arrival,
        max_tokens=integer_parameter(request, "max_tokens")
        if "max_tokens" in given
        else default_max_tokens,
        sampling=Sampling(
            temperature=number_parameter(request, "temperature") if "temperature" in given else 0.0,
            top_k=integer_parameter(request, "top_k") if "top_k" in given else 0,
            top_p=number_parameter(request, "top_p") if "top_p" in given else 1.0,
            seed=integer_parameter(request, "seed") if "seed" in given else None,
        ),
        hard_deadline=deadlines.hard,
        budget=TokenBudget(first_token_s, per_token_s, deadlines.soft - arrival),
        min_quality=options.min_quality,
        variant=options.variant,
        tenant=tenant_of(metadata),
    )


def _read_prompt(request: pb.ModelInferRequest) -> str:
    tensor = only_input(request, INPUT)
    if tensor.datatype != "BYTES" or math.prod(tensor.shape) != 1:
        got = f"{tensor.datatype[:20]} {list(tensor.shape)}"
        raise InvalidArgument(INPUT, f"expected BYTES of shape [1], got {got}")
    texts = bytes_elements(request, tensor)
    if len(texts) != 1:
        raise InvalidArgument(INPUT, f"expected one text, got {len(texts)}")
    try:
        return texts[0].decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(INPUT, f"expected UTF-8, got other bytes: {error}") from None


def build_response(
    request: pb.ModelInferRequest, model: TextModel, chunk: TokenChunk, replica: str
) -> pb.ModelInferResponse:
    """Return the response of one token; that of the last one has the accounting."""
    response = pb.ModelInferResponse(
        model_name=model.name, model_version=model.version, id=request.id
    )
    text = chunk.text.encode()
    response.outputs.add(name=TEXT_OUTPUT, datatype="BYTES", shape=[1])
    response.raw_output_contents.append(len(text).to_bytes(4, "little") + text)
    response.outputs.add(name=TOKEN_OUTPUT, datatype="INT32", shape=[1])
    response.raw_output_contents.append(chunk.token.to_bytes(4, "little"))
    response.parameters["triton_final_response"].bool_param = chunk.usage is not None
    if chunk.usage is not None:
        _add_accounting(response, chunk, chunk.usage, replica)
    return response


def _add_accounting(
    response: pb.ModelInferResponse, last: TokenChunk, usage: GenerationUsage, replica: str
) -> None:
    info, parameters = last.answer, response.parameters
    for key, value in (
        ("variant_id", info.variant),
        ("queue_us", round(1e6 * usage.queue_s)),
        ("first_token_us", round(1e6 * usage.first_token_s)),
        ("total_us", round(1e6 * usage.total_s)),
        ("prompt_tokens", usage.prompt_tokens),
        ("generated_tokens", usage.generated_tokens),
    ):
        parameters[f"ladderstitch_{key}"].int64_param = value
    parameters["ladderstitch_variant_name"].string_param = info.name
    spans = [[span.name, span.num_tokens] for span in info.spans]
    parameters["ladderstitch_spans"].string_param = json.dumps(spans)
    parameters["ladderstitch_replica"].string_param = replica
    parameters["ladderstitch_finish_reason"].string_param = last.finish or ""
    if info.quality is not None:
        parameters["ladderstitch_quality"].double_param = info.quality.value
    if usage.met is not None:
        parameters["ladderstitch_budget_met"].bool_param = usage.met


def describe_metadata(model: TextModel) -> pb.ModelMetadataResponse:
    """Return the names, types and shapes of a model's inputs and outputs."""
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=model.name,
        versions=[model.version],
        platform=PLATFORM,
        inputs=[tensor(name=INPUT, datatype="BYTES", shape=[1])],
        outputs=[
            tensor(name=TEXT_OUTPUT, datatype="BYTES", shape=[1]),
            tensor(name=TOKEN_OUTPUT, datatype="INT32", shape=[1]),
        ],
        properties={
            "parameters": ", ".join(TEXT_PARAMETERS),
            "max_model_len": str(model.scheduler.max_tokens),
            "variants": str(len(model.bundle.manifest.variants)),
        },
    )


def describe_config(model: TextModel) -> model_config_pb2.ModelConfig:
    """Return the configuration of a model that clients of the protocol read."""
    kinds = model_config_pb2.DataType
    output = model_config_pb2.ModelOutput
    return model_config_pb2.ModelConfig(
        name=model.name,
        platform=PLATFORM,
        backend=PLATFORM,
        input=[model_config_pb2.ModelInput(name=INPUT, data_type=kinds.TYPE_STRING, dims=[1])],
        output=[
            output(name=TEXT_OUTPUT, data_type=kinds.TYPE_STRING, dims=[1]),
            output(name=TOKEN_OUTPUT, data_type=kinds.TYPE_INT32, dims=[1]),
        ],
        model_transaction_policy=model_config_pb2.ModelTransactionPolicy(decoupled=True),
    )


Respond = Callable[[pb.ModelInferRequest], AsyncGenerator[pb.ModelInferResponse]]
"""A function that yields the responses to one request of a stream."""


async def answer_stream(
    requests: AsyncIterator[pb.ModelInferRequest], respond: Respond
) -> AsyncGenerator[pb.ModelStreamInferResponse]:
    """Yield the responses to all requests of a stream as they are made.

    A request that fails ends with an `error_message` and does not affect the others. Closing the
    generator cancels all requests.
    """
    ready: asyncio.Queue[pb.ModelStreamInferResponse | None] = asyncio.Queue(MAX_QUEUED_RESPONSES)
    in_flight = asyncio.Semaphore(MAX_IN_FLIGHT)

    async def answer(request: pb.ModelInferRequest) -> None:
        try:
            async with aclosing(respond(request)) as responses:
                async for response in responses:
                    await ready.put(pb.ModelStreamInferResponse(infer_response=response))
        except RequestError as error:
            failed = pb.ModelStreamInferResponse(error_message=f"{error.reason}: {error}")
            failed.infer_response.id = request.id
            failed.infer_response.parameters["triton_final_response"].bool_param = True
            await ready.put(failed)
        finally:
            in_flight.release()

    async def read_requests() -> None:
        async with asyncio.TaskGroup() as group:
            async for request in requests:
                await in_flight.acquire()
                group.create_task(answer(request))
        await ready.put(None)

    reading = asyncio.create_task(read_requests())
    try:
        while (response := await _next_response(ready, reading)) is not None:
            yield response
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def _next_response(
    ready: asyncio.Queue[pb.ModelStreamInferResponse | None], reading: asyncio.Task[None]
) -> pb.ModelStreamInferResponse | None:
    """Return the next response; raises the exception of `reading` if that task has failed."""
    getting = asyncio.ensure_future(ready.get())
    try:
        await asyncio.wait({getting, reading}, return_when=asyncio.FIRST_COMPLETED)
        if not getting.done() and reading.exception() is not None:
            reading.result()
        return await getting
    finally:
        getting.cancel()

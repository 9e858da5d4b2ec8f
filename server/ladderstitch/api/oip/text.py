"""Text over the Open Inference Protocol: one BYTES input `text_input`, a response a token.

Each response has `text_output` (BYTES) and `token_id` (INT32) of shape [1]; the last one bears the
parameter `triton_final_response`, as Triton's decoupled models do, and what the answer cost.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

from ladderstitch.api.deadlines import Metadata, call_deadlines, resolve_deadlines, token_budgets
from ladderstitch.api.oip.inputs import (
    RequestOptions,
    integer,
    number,
    read_parameters,
    split_bytes,
)
from ladderstitch.api.oip.metadata import PLATFORM
from ladderstitch.api.validation import DEFAULT_MAX_TOKENS, tokenise
from ladderstitch.errors import InvalidArgument, RequestError
from ladderstitch.hosting.registry import TextModel
from ladderstitch.hosting.streaming import GenerationUsage
from ladderstitch.oip import grpc_service_pb2 as pb
from ladderstitch.oip import model_config_pb2
from ladderstitch.scheduling.requests import (
    GenerationRequest,
    Sampling,
    TokenBudget,
    TokenChunk,
)
from ladderstitch.security.tokens import tenant_of

INPUT, TEXT, TOKEN = "text_input", "text_output", "token_id"
OWN = ("max_tokens", "temperature", "top_k", "top_p", "seed")
"""Parameters of text besides those that all models know."""


def accept(
    request: pb.ModelInferRequest,
    model: TextModel,
    arrival: float,
    remaining_s: float | None,
    metadata: Metadata,
) -> GenerationRequest:
    """Raises `InvalidArgument` naming what is wrong."""
    wishes = RequestOptions(call_deadlines(remaining_s, metadata, None))
    read_parameters(request, wishes, OWN)
    resolved = resolve_deadlines(arrival, wishes.deadlines)
    first_token_s, per_token_s = token_budgets(metadata)
    tokens = tokenise(_prompt(request), model, INPUT)
    given = request.parameters
    left = model.scheduler.max_tokens - len(tokens)
    default = min(DEFAULT_MAX_TOKENS, left)
    return GenerationRequest(
        tokens=tokens,
        arrival=arrival,
        max_tokens=integer(request, "max_tokens") if "max_tokens" in given else default,
        sampling=Sampling(
            temperature=number(request, "temperature") if "temperature" in given else 0.0,
            top_k=integer(request, "top_k") if "top_k" in given else 0,
            top_p=number(request, "top_p") if "top_p" in given else 1.0,
            seed=integer(request, "seed") if "seed" in given else None,
        ),
        hard_deadline=resolved.hard,
        budget=TokenBudget(first_token_s, per_token_s, resolved.soft - arrival),
        min_quality=wishes.min_quality,
        variant=wishes.variant,
        tenant=tenant_of(metadata),
    )


def _prompt(request: pb.ModelInferRequest) -> str:
    if len(request.inputs) != 1 or request.inputs[0].name != INPUT:
        names = [tensor.name[:80] for tensor in request.inputs]
        raise InvalidArgument("inputs", f"expected exactly one input named {INPUT!r}, got {names}")
    tensor, raw = request.inputs[0], request.raw_input_contents
    if tensor.datatype != "BYTES" or math.prod(tensor.shape) != 1:
        got = f"{tensor.datatype[:20]} {list(tensor.shape)}"
        raise InvalidArgument(INPUT, f"expected BYTES of shape [1], got {got}")
    typed = tensor.HasField("contents")
    if typed == bool(raw) or len(raw) > 1:
        raise InvalidArgument(INPUT, "expected either one raw content or typed contents")
    texts = list(tensor.contents.bytes_contents) if typed else split_bytes(INPUT, raw[0])
    if len(texts) != 1:
        raise InvalidArgument(INPUT, f"expected one text, got {len(texts)}")
    try:
        return texts[0].decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(INPUT, f"expected UTF-8: {error}") from None


def response(
    request: pb.ModelInferRequest,
    model: TextModel,
    piece: TokenChunk,
    account: GenerationUsage | None,
    replica: str,
) -> pb.ModelInferResponse:
    made = pb.ModelInferResponse(model_name=model.name, model_version=model.version, id=request.id)
    text = piece.text.encode()
    made.outputs.add(name=TEXT, datatype="BYTES", shape=[1])
    made.raw_output_contents.append(len(text).to_bytes(4, "little") + text)
    made.outputs.add(name=TOKEN, datatype="INT32", shape=[1])
    made.raw_output_contents.append(piece.token.to_bytes(4, "little"))
    made.parameters["triton_final_response"].bool_param = account is not None
    if account is not None:
        _add_account(made, piece, account, replica)
    return made


def _add_account(
    made: pb.ModelInferResponse, last: TokenChunk, account: GenerationUsage, replica: str
) -> None:
    parameters = made.parameters
    for key, value in (
        ("variant_id", last.answer.path),
        ("queue_us", round(1e6 * account.queue_s)),
        ("first_token_us", round(1e6 * account.first_token_s)),
        ("total_us", round(1e6 * account.total_s)),
        ("prompt_tokens", account.prompt_tokens),
        ("generated_tokens", account.generated_tokens),
    ):
        parameters[f"ladderstitch_{key}"].int64_param = value
    parameters["ladderstitch_variant_name"].string_param = last.answer.name
    parameters["ladderstitch_replica"].string_param = replica
    parameters["ladderstitch_finish_reason"].string_param = last.finish or ""
    if last.answer.quality is not None:
        parameters["ladderstitch_quality"].double_param = last.answer.quality.value
    if account.met is not None:
        parameters["ladderstitch_budget_met"].bool_param = account.met


def metadata(model: TextModel) -> pb.ModelMetadataResponse:
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=model.name,
        versions=[model.version],
        platform=PLATFORM,
        inputs=[tensor(name=INPUT, datatype="BYTES", shape=[1])],
        outputs=[
            tensor(name=TEXT, datatype="BYTES", shape=[1]),
            tensor(name=TOKEN, datatype="INT32", shape=[1]),
        ],
        properties={
            "parameters": ", ".join(OWN),
            "max_model_len": str(model.scheduler.max_tokens),
            "variants": str(len(model.bundle.manifest.ways)),
        },
    )


def config(model: TextModel) -> model_config_pb2.ModelConfig:
    kinds = model_config_pb2.DataType
    output = model_config_pb2.ModelOutput
    return model_config_pb2.ModelConfig(
        name=model.name,
        platform=PLATFORM,
        backend=PLATFORM,
        input=[model_config_pb2.ModelInput(name=INPUT, data_type=kinds.TYPE_STRING, dims=[1])],
        output=[
            output(name=TEXT, data_type=kinds.TYPE_STRING, dims=[1]),
            output(name=TOKEN, data_type=kinds.TYPE_INT32, dims=[1]),
        ],
        model_transaction_policy=model_config_pb2.ModelTransactionPolicy(decoupled=True),
    )


MOST_IN_FLIGHT = 256
"""Requests of one stream that are worked on; the next is read when one has ended."""

Respond = Callable[[pb.ModelInferRequest], AsyncGenerator[pb.ModelInferResponse]]


async def answer_stream(
    requests: AsyncIterator[pb.ModelInferRequest], respond: Respond
) -> AsyncGenerator[pb.ModelStreamInferResponse]:
    """All responses to all requests as they are made; a request that fails ends in an
    `error_message` and leaves the others alone. Closing it ends all work."""
    ready: asyncio.Queue[pb.ModelStreamInferResponse | None] = asyncio.Queue(maxsize=64)
    places = asyncio.Semaphore(MOST_IN_FLIGHT)

    async def work(request: pb.ModelInferRequest) -> None:
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
            places.release()

    async def read() -> None:
        async with asyncio.TaskGroup() as group:
            async for request in requests:
                await places.acquire()
                group.create_task(work(request))
        await ready.put(None)

    reading = asyncio.create_task(read())
    try:
        while (response := await _next(ready, reading)) is not None:
            yield response
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def _next(
    ready: asyncio.Queue[pb.ModelStreamInferResponse | None], reading: asyncio.Task[None]
) -> pb.ModelStreamInferResponse | None:
    """The next response; raises what ended the reading, if something did."""
    getting = asyncio.ensure_future(ready.get())
    try:
        await asyncio.wait({getting, reading}, return_when=asyncio.FIRST_COMPLETED)
        if not getting.done() and reading.exception() is not None:
            reading.result()
        return await getting
    finally:
        getting.cancel()

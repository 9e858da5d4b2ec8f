"""Language models over the Open Inference Protocol: one BYTES input, one response per token.

The input is `text_input`. Each response has `text_output` (BYTES) and `token_id` (INT32) of shape
[1]. The last one has the parameter `triton_final_response`, as in Triton's decoupled models, and
the accounting of the answer.
"""

from __future__ import annotations

import json
import math

from ladderstitch.api.deadlines import Metadata, call_deadlines, resolve_deadlines, token_budgets
from ladderstitch.api.native.generation import DEFAULT_MAX_TOKENS, tenant_of
from ladderstitch.api.oip.inputs import (
    PLATFORM,
    RequestedOutput,
    bytes_contents,
    bytes_elements,
    integer_parameter,
    number_parameter,
    only_input,
    read_parameters,
    requested_outputs,
)
from ladderstitch.api.oip.options import OPTIONS, Treatment
from ladderstitch.errors import InvalidArgument
from ladderstitch.hosting.registry import TextModel
from ladderstitch.oip import grpc_service_pb2 as pb
from ladderstitch.oip import model_config_pb2
from ladderstitch.scheduling.generation import (
    GenerationRequest,
    GenerationUsage,
    TokenBudget,
    TokenChunk,
)
from ladderstitch.scheduling.requests import check_id
from ladderstitch.scheduling.sampling import Sampling

INPUT, TEXT_OUTPUT, TOKEN_OUTPUT = "text_input", "text_output", "token_id"
MAX_DIMENSIONS = 8
"""Dimensions of a shape that are read; texts have one."""
OUTPUTS = (TEXT_OUTPUT, TOKEN_OUTPUT)
TEXT_PARAMETERS = [
    o.name for o in OPTIONS if o.kind == "text" and o.treatment == Treatment.HONOURED
]
"""Parameters of text requests in addition to those of all models."""


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
    check_id("id", request.id)
    budgets = call_deadlines(remaining_s, metadata, None)
    options = read_parameters(request, budgets, "text")
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
    shape = tensor.shape
    if tensor.datatype != "BYTES" or len(shape) > MAX_DIMENSIONS or math.prod(shape) != 1:
        got = f"{tensor.datatype[:20]} {list(shape[:MAX_DIMENSIONS])} ({len(shape)} dimensions)"
        raise InvalidArgument(INPUT, f"expected BYTES of shape [1], got {got}")
    texts = bytes_elements(request, tensor, 1)
    if len(texts) != 1:
        raise InvalidArgument(INPUT, f"expected one text, got {len(texts)}")
    try:
        return texts[0].decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(INPUT, f"expected UTF-8, got other bytes: {error}") from None


def read_outputs(request: pb.ModelInferRequest) -> tuple[RequestedOutput, ...]:
    """Return the requested outputs, by default all; raises `InvalidArgument`."""
    return requested_outputs(request, OUTPUTS, OUTPUTS, "text")


def build_response(
    request: pb.ModelInferRequest,
    model: TextModel,
    chunk: TokenChunk,
    outputs: tuple[RequestedOutput, ...],
    replica: str,
) -> pb.ModelInferResponse:
    """Return the response of one token; that of the last one has the accounting."""
    response = pb.ModelInferResponse(
        model_name=model.name, model_version=model.version, id=request.id
    )
    for output in outputs:
        if output.name == TEXT_OUTPUT:
            response.outputs.add(name=TEXT_OUTPUT, datatype="BYTES", shape=[1])
            response.raw_output_contents.append(bytes_contents([chunk.text.encode()]))
        else:
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
    spans = [
        [s.name, s.num_tokens, *([s.cache, s.penalty_nats] if s.cache else [])] for s in info.spans
    ]
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

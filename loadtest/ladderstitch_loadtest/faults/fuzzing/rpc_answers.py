"""Checks of accepted gRPC answers: finite numbers, indices in order, exactly one finish."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError, Message

from ladderstitch.oip import grpc_service_pb2 as oip
from ladderstitch.v1 import generation_pb2, inference_pb2
from ladderstitch_loadtest.faults.fuzzing.cases import Answer, Case, Check

FINAL = "triton_final_response"
NUMBER_TYPES = {"FP32": "<f4", "INT32": "<i4"}


def parse(message_type: Any, data: bytes) -> Any:
    """Return the parsed message, or None if the bytes are no such message."""
    try:
        return message_type.FromString(data)
    except DecodeError:
        return None


def expect_one(response_type: type[Message]) -> Check:
    """Return a check for exactly one response of a type, all numbers of which are finite."""

    def check(case: Case, answer: Answer) -> str:
        if len(answer.body) != 1:
            return f"expected one response, got {len(answer.body)}"
        response = parse(response_type, answer.body[0])
        if response is None:
            return f"expected {response_type.__name__}, got other bytes"
        return _find_not_finite(response)

    return check


def _find_not_finite(message: Message) -> str:
    """Return a text about the first number in a message that is not finite."""
    for field, value in message.ListFields():
        values = value if field.is_repeated and field.message_type is None else [value]
        for one in values if field.message_type is None else ():
            if isinstance(one, float) and not math.isfinite(one):
                return f"{field.name}: expected a finite number, got {one}"
    return ""


def check_infer(case: Case, answer: Answer) -> str:
    """Check the predictions of `Infer`: one per image, finite logits, probabilities in order."""
    if wrong := expect_one(inference_pb2.InferResponse)(case, answer):
        return wrong
    response = inference_pb2.InferResponse.FromString(answer.body[0])
    request = inference_pb2.InferRequest.FromString(case.messages[0])
    images = request.tensor.shape[0] if request.HasField("tensor") else 1
    if len(response.predictions) != images:
        return f"expected {images} predictions, got {len(response.predictions)}"
    if response.request_id != request.request_id:
        return f"expected id {request.request_id!r}, got {response.request_id!r}"
    if response.accounting.batch_size < images:
        return f"expected a batch of {images} or more, got {response.accounting.batch_size}"
    for prediction in response.predictions:
        probabilities = [top.probability for top in prediction.top]
        if not prediction.logits or not np.isfinite(prediction.logits).all():
            return f"expected finite logits, got {list(prediction.logits)[:4]}"
        if any(not 0 <= p <= 1 for p in probabilities):
            return f"expected probabilities from 0 to 1, got {probabilities}"
        if probabilities != sorted(probabilities, reverse=True):
            return f"expected probabilities in order, got {probabilities}"
    return ""


def check_generate(case: Case, answer: Answer) -> str:
    """Check a stream of tokens: indices from 0 without gaps, and a finish in the last response."""
    request = generation_pb2.GenerateRequest.FromString(case.messages[0])
    responses = [parse(generation_pb2.GenerateResponse, data) for data in answer.body]
    if not responses or None in responses:
        return f"expected responses, got {len(responses)}, some of other bytes"
    if [response.index for response in responses] != list(range(len(responses))):
        return "expected indices from 0 without gaps"
    finishes = [bool(response.finish_reason) for response in responses]
    if finishes != [False] * (len(responses) - 1) + [True]:
        return f"expected a finish in the last response only, got {finishes}"
    if any(response.request_id != request.request_id for response in responses):
        return f"expected id {request.request_id!r} in all responses"
    accounting = responses[-1].accounting
    if accounting.generated_tokens != len(responses):
        return f"expected {len(responses)} generated tokens, got {accounting.generated_tokens}"
    if request.HasField("max_tokens") and len(responses) > request.max_tokens:
        return f"expected at most {request.max_tokens} tokens, got {len(responses)}"
    return _check_logprobs(request, responses)


def _check_logprobs(request: Any, responses: list[Any]) -> str:
    for response in responses:
        values = [response.logprob, *(top.logprob for top in response.top_logprobs)]
        if not all(math.isfinite(value) and value <= 1e-6 for value in values):
            return f"token {response.index}: expected finite log probabilities, got {values}"
        wanted = request.logprobs if request.HasField("logprobs") else 0
        if len(response.top_logprobs) != wanted:
            return f"expected {wanted} alternatives, got {len(response.top_logprobs)}"
    return ""


def check_model_infer(case: Case, answer: Answer) -> str:
    """Check the one response of `ModelInfer`."""
    if wrong := expect_one(oip.ModelInferResponse)(case, answer):
        return wrong
    request = oip.ModelInferRequest.FromString(case.messages[0])
    response = oip.ModelInferResponse.FromString(answer.body[0])
    if response.id != request.id:
        return f"expected id {request.id!r}, got {response.id!r}"
    return _check_outputs(response, finite=_is_finite(request))


def _is_finite(request: oip.ModelInferRequest) -> bool:
    """Return whether the inputs hold finite numbers only; others are computed as they are."""
    values = [value for tensor in request.inputs for value in tensor.contents.fp32_contents]
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=False):
        if tensor.datatype == "FP32":
            values.extend(np.frombuffer(raw[: len(raw) // 4 * 4], "<f4").tolist())
    return all(map(math.isfinite, values))


def _check_outputs(response: oip.ModelInferResponse, *, finite: bool) -> str:
    """Check that the outputs have the sizes of their shapes, and finite numbers if `finite`."""
    if not response.outputs or len(response.outputs) != len(response.raw_output_contents):
        return "expected one raw content for each output"
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.datatype not in NUMBER_TYPES:
            continue
        values = np.frombuffer(raw, NUMBER_TYPES[output.datatype])
        if len(values) != math.prod(output.shape) or (finite and not np.isfinite(values).all()):
            return f"{output.name}: expected {list(output.shape)} finite numbers, got {values[:4]}"
    return ""


def check_stream_infer(case: Case, answer: Answer) -> str:
    """Check that every request of a stream ends once: with its last response, or with an error.

    A message that cannot be parsed has no id, and must end with an error.
    """
    requests = [parse(oip.ModelInferRequest, data) for data in case.messages]
    responses = [parse(oip.ModelStreamInferResponse, data) for data in answer.body]
    if None in responses:
        return "expected ModelStreamInferResponse, got other bytes"
    finite = all(request is None or _is_finite(request) for request in requests)
    for response in responses:
        inner = response.infer_response
        if not response.error_message and (wrong := _check_outputs(inner, finite=finite)):
            return wrong
        if response.error_message.startswith(("INTERNAL", "UNKNOWN", "UNAVAILABLE")):
            return f"expected an error of the request, got {response.error_message}"
    refused = sum(bool(r.error_message) for r in responses if not r.infer_response.id)
    if refused < requests.count(None):
        return f"expected {requests.count(None)} errors without an id, got {refused}"
    expected = Counter(request.id if request else "" for request in requests)
    ended = Counter(r.infer_response.id for r in responses if _is_last(r))
    if ended != expected:
        return f"expected one end for each of {dict(expected)}, got {dict(ended)}"
    return _check_error_of_stream(responses)


def _is_last(response: oip.ModelStreamInferResponse) -> bool:
    """Return whether a response ends its request; image models answer with one response."""
    parameters = response.infer_response.parameters
    return FINAL not in parameters or parameters[FINAL].bool_param


def _check_error_of_stream(responses: Iterable[Any]) -> str:
    for response in responses:
        has_outputs = bool(response.infer_response.outputs)
        if bool(response.error_message) == has_outputs:
            return "expected either outputs or an error message in each response"
    return ""

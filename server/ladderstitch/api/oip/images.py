"""Image models over the Open Inference Protocol: requests, responses, metadata and statistics.

One input, `images`: UINT8 (pixels) or FP32 (preprocessed) of [B, C, H, W], or BYTES of [B] (PNG or
JPEG files). Outputs: `logits`, and on request `probabilities` and `labels`; instead of the values
of the former two, clients may ask for the best classes. Models that return tensors have their own
outputs by name. Models that do not take images have their own input, FP32 only.
"""

from __future__ import annotations

import asyncio
import math
import time

import numpy as np

from ladderstitch.api.deadlines import LatencyBudget, resolve_deadlines
from ladderstitch.api.oip.inputs import (
    InputTensor,
    RequestedOutput,
    bytes_contents,
    bytes_elements,
    only_input,
    read_parameters,
    requested_outputs,
)
from ladderstitch.errors import InvalidArgument
from ladderstitch.hosting.registry import VisionModel
from ladderstitch.oip import grpc_service_pb2 as pb
from ladderstitch.scheduling.requests import ImageAnswer, Logits, Pixels, Request, check_id
from ladderstitch.vision.networks.config import TensorInputs
from ladderstitch.vision.networks.outputs import split_rows

INPUT = "images"
OUTPUTS = ("logits", "probabilities", "labels")


async def build_request(
    request: pb.ModelInferRequest,
    model: VisionModel,
    arrival: float,
    budgets: list[LatencyBudget],
    outputs: tuple[RequestedOutput, ...],
) -> Request:
    """Return the request for the scheduler; `budgets` are those of the call itself.

    Raises `InvalidArgument` that names the wrong field.
    """
    check_id("id", request.id)
    options = read_parameters(request, budgets, "images")
    images, is_finite = await _read_images(request, model)
    requested = {output.name for output in outputs}
    entries = [entry for entry in model.bundle.manifest.outputs if entry.name in requested]
    model.limit.check_request(input_name(model), len(images), entries)
    return Request(
        images=images,
        id=request.id,
        arrival=arrival,
        deadlines=resolve_deadlines(arrival, options.budgets),
        min_quality=options.min_quality,
        variant=options.variant,
        priority=options.priority,
        min_confidence=options.min_confidence,
        is_finite=is_finite,
    )


def input_name(model: VisionModel) -> str:
    """Return the name of a model's input."""
    inputs = model.bundle.manifest.config.inputs
    return inputs.name if isinstance(inputs, TensorInputs) else INPUT


async def _read_images(request: pb.ModelInferRequest, model: VisionModel) -> tuple[Pixels, bool]:
    """Return the inputs of a request, and whether all their numbers are finite."""
    name = input_name(model)
    tensor = only_input(request, name)
    if tensor.datatype == "BYTES":
        if not model.bundle.manifest.takes_images:
            model.reader.check_bytes(name, request.ByteSize())
        max_batch_size = model.scheduler.planner.latency.view.max_batch_size
        files = bytes_elements(request, tensor, max_batch_size)
        return await _decode_files(tensor, files, model), True
    is_typed = tensor.HasField("contents")
    data = _typed_contents(tensor) if is_typed else request.raw_input_contents[0]
    computes_any = tensor.datatype == "FP32" and model.reader.non_finite == "compute"
    images = model.reader.read_tensor(
        name, tensor.datatype, tensor.shape, data, finite=not computes_any
    )
    return images, not computes_any or bool(np.isfinite(images).all())


async def _decode_files(tensor: InputTensor, files: list[bytes], model: VisionModel) -> Pixels:
    shape = list(tensor.shape)
    if shape not in ([len(files)], [len(files), 1]):
        raise InvalidArgument(f"{INPUT}.shape", f"expected [{len(files)}], got {shape}")
    if not files:
        raise InvalidArgument(INPUT, "expected at least 1 file, got 0")
    decoded = []
    for number, file in enumerate(files):
        field = INPUT if len(files) == 1 else f"{INPUT}[{number}]"
        decoded.append(await model.reader.read_encoded(field, file))
        await asyncio.sleep(0)  # cheap images are decoded on the event loop
    return np.concatenate(decoded)


def _typed_contents(tensor: InputTensor) -> bytes:
    if tensor.datatype == "FP32":
        return np.asarray(tensor.contents.fp32_contents, "<f4").tobytes()
    if tensor.datatype == "UINT8":
        values = np.asarray(tensor.contents.uint_contents, np.uint32)
        if (values > 255).any():
            raise InvalidArgument(f"{INPUT}.contents", f"expected 0 to 255, got {values.max()}")
        return values.astype(np.uint8).tobytes()
    raise InvalidArgument(
        f"{INPUT}.datatype", f"expected FP32, UINT8 or BYTES, got {tensor.datatype!r}"
    )


def read_outputs(request: pb.ModelInferRequest, model: VisionModel) -> tuple[RequestedOutput, ...]:
    """Return the requested outputs; raises `InvalidArgument`.

    By default they are the logits, and all outputs of a model that returns tensors.
    """
    names = tuple(output.name for output in model.bundle.manifest.outputs)
    if not names:
        outputs = requested_outputs(request, OUTPUTS, ("logits",), "images")
        without = "labels, which are BYTES"
        wrong = any(output.name == "labels" and output.num_classes for output in outputs)
    else:
        outputs = requested_outputs(request, names, names, "images")
        without = "tensors"
        wrong = any(output.num_classes for output in outputs)
    if wrong:
        raise InvalidArgument("outputs.parameters.classification", f"expected none for {without}")
    return outputs


def build_response(
    model: VisionModel,
    request: Request,
    completion: ImageAnswer,
    outputs: tuple[RequestedOutput, ...],
    replica: str,
) -> pb.ModelInferResponse:
    """Return the response to a request; its parameters hold the accounting."""
    response = pb.ModelInferResponse(
        model_name=model.name, model_version=model.version, id=request.id
    )
    manifest = model.bundle.manifest
    if manifest.outputs:
        tensors = split_rows(completion.logits, manifest.outputs)
        types = {entry.name: entry.data_type for entry in manifest.outputs}
        for output in outputs:
            values = tensors[output.name]
            response.outputs.add(name=output.name, datatype=types[output.name], shape=values.shape)
            response.raw_output_contents.append(values.tobytes())
    else:
        for output in outputs:
            _add_output(response, output, completion, manifest.labels)
    now, parameters = time.monotonic(), response.parameters
    for key, value in (
        ("variant_id", completion.variant),
        ("queue_us", round(1e6 * completion.queue_s)),
        ("compute_us", round(1e6 * completion.compute_s)),
        ("total_us", round(1e6 * (now - request.arrival))),
        ("batch_size", completion.batch_size),
    ):
        parameters[f"ladderstitch_{key}"].int64_param = value
    variant_name = model.variant_names[completion.variant]
    parameters["ladderstitch_variant_name"].string_param = variant_name
    parameters["ladderstitch_quality"].double_param = completion.quality
    parameters["ladderstitch_replica"].string_param = replica
    if (certainty := completion.certainty) is not None:
        stages = ",".join(map(str, certainty.stages))
        parameters["ladderstitch_stages"].string_param = stages
        parameters["ladderstitch_confidence"].double_param = min(certainty.confidence)
    deadlines = request.deadlines
    if deadlines.soft != math.inf:
        budget_us = round(1e6 * (deadlines.soft - request.arrival))
        parameters["ladderstitch_budget_us"].int64_param = budget_us
        parameters["ladderstitch_budget_source"].string_param = deadlines.soft_source
        parameters["ladderstitch_budget_met"].bool_param = now <= deadlines.soft
    return response


def _add_output(
    response: pb.ModelInferResponse,
    output: RequestedOutput,
    completion: ImageAnswer,
    labels: tuple[str, ...],
) -> None:
    name, logits = output.name, completion.logits
    if name == "labels":
        best = [labels[i].encode() for i in logits.argmax(axis=1)]
        response.outputs.add(name=name, datatype="BYTES", shape=[len(best)])
        response.raw_output_contents.append(bytes_contents(best))
        return
    values = logits if name == "logits" else _softmax(logits)
    if output.num_classes:
        classes = best_classes(values, output.num_classes, labels)
        shape = [len(values), len(classes) // len(values)]
        response.outputs.add(name=name, datatype="BYTES", shape=shape)
        response.raw_output_contents.append(bytes_contents(classes))
        return
    response.outputs.add(name=name, datatype="FP32", shape=values.shape)
    response.raw_output_contents.append(np.ascontiguousarray(values, "<f4").tobytes())


def best_classes(values: Logits, num_classes: int, labels: tuple[str, ...]) -> list[bytes]:
    """Return `value:index:label` of the best classes of each row of values [B, K], best first.

    This is the format of Triton's classification extension: values have six decimals. There are
    min(`num_classes`, K) classes a row.
    """
    best = (-values).argsort(axis=1, kind="stable")[:, :num_classes]
    return [
        f"{row[i]:f}:{i}:{labels[i]}".encode()
        for row, order in zip(values.tolist(), best.tolist(), strict=True)
        for i in order
    ]


def _softmax(logits: Logits) -> Logits:
    """Return the probabilities [B, K] of logits [B, K]."""
    with np.errstate(invalid="ignore"):  # infinite logits of an infinite input
        powers: Logits = np.exp(logits - np.maximum.reduce(logits, axis=1, keepdims=True))
        powers /= np.add.reduce(powers, axis=1, keepdims=True)
    return powers

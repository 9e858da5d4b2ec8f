"""Image models over the Open Inference Protocol: requests, responses, metadata and statistics.

One input, `images`: FP32 (preprocessed) or UINT8 (pixels) of [B, C, H, W], or BYTES of [B] (PNG or
JPEG files). Outputs: `logits`, and on request `probabilities` and `labels`.
"""

from __future__ import annotations

import json
import math
import time

import numpy as np

from ladderstitch.api.deadlines import LatencyBudget, resolve_deadlines
from ladderstitch.api.oip.inputs import (
    PLATFORM,
    InputTensor,
    bytes_elements,
    only_input,
    read_parameters,
)
from ladderstitch.errors import InvalidArgument
from ladderstitch.hosting.registry import VisionModel
from ladderstitch.oip import grpc_service_pb2 as pb
from ladderstitch.oip import model_config_pb2
from ladderstitch.scheduling.requests import ImageAnswer, Logits, Pixels, Request, check_id
from ladderstitch.vision.scheduler.in_flight import Total

INPUT = "images"
OUTPUTS = ("logits", "probabilities", "labels")


async def build_request(
    request: pb.ModelInferRequest, model: VisionModel, arrival: float, budgets: list[LatencyBudget]
) -> Request:
    """Return the request for the scheduler; `budgets` are those of the call itself.

    Raises `InvalidArgument` that names the wrong field.
    """
    check_id("id", request.id)
    options = read_parameters(request, budgets)
    return Request(
        images=await _read_images(request, model),
        id=request.id,
        arrival=arrival,
        deadlines=resolve_deadlines(arrival, options.budgets),
        min_quality=options.min_quality,
        variant=options.variant,
        priority=options.priority,
    )


async def _read_images(request: pb.ModelInferRequest, model: VisionModel) -> Pixels:
    tensor = only_input(request, INPUT)
    if tensor.datatype == "BYTES":
        return await _decode_files(tensor, bytes_elements(request, tensor), model)
    is_typed = tensor.HasField("contents")
    data = _typed_contents(tensor) if is_typed else request.raw_input_contents[0]
    return model.reader.read_tensor(INPUT, tensor.datatype, tensor.shape, data)


async def _decode_files(tensor: InputTensor, files: list[bytes], model: VisionModel) -> Pixels:
    shape = list(tensor.shape)
    if shape not in ([len(files)], [len(files), 1]):
        raise InvalidArgument(f"{INPUT}.shape", f"expected [{len(files)}], got {shape}")
    max_batch_size = model.scheduler.planner.latency.view.max_batch_size
    if not 1 <= len(files) <= max_batch_size:
        raise InvalidArgument(INPUT, f"expected 1 to {max_batch_size} files, got {len(files)}")
    return np.concatenate([await model.reader.read_encoded(INPUT, file) for file in files])


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


def requested_outputs(request: pb.ModelInferRequest) -> tuple[str, ...]:
    """Return the names of the requested outputs, by default the logits only.

    Raises `InvalidArgument` for an unknown one.
    """
    names = tuple(output.name for output in request.outputs) or ("logits",)
    for name in names:
        if name not in OUTPUTS:
            raise InvalidArgument("outputs", f"expected some of {list(OUTPUTS)}, got {name[:80]!r}")
    return names


def build_response(
    model: VisionModel,
    request: Request,
    completion: ImageAnswer,
    outputs: tuple[str, ...],
    replica: str,
) -> pb.ModelInferResponse:
    """Return the response to a request; its parameters hold the accounting."""
    response = pb.ModelInferResponse(
        model_name=model.name, model_version=model.version, id=request.id
    )
    for name in outputs:
        _add_output(response, name, completion, model.bundle.manifest.labels)
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
    deadlines = request.deadlines
    if deadlines.soft != math.inf:
        budget_us = round(1e6 * (deadlines.soft - request.arrival))
        parameters["ladderstitch_budget_us"].int64_param = budget_us
        parameters["ladderstitch_budget_source"].string_param = deadlines.soft_source
        parameters["ladderstitch_budget_met"].bool_param = now <= deadlines.soft
    return response


def _add_output(
    response: pb.ModelInferResponse, name: str, completion: ImageAnswer, labels: tuple[str, ...]
) -> None:
    if name == "labels":
        best = [labels[i].encode() for i in completion.logits.argmax(axis=1)]
        raw = b"".join(len(label).to_bytes(4, "little") + label for label in best)
        response.outputs.add(name=name, datatype="BYTES", shape=[len(best)])
    else:
        values = completion.logits if name == "logits" else _softmax(completion.logits)
        raw = np.ascontiguousarray(values, "<f4").tobytes()
        response.outputs.add(name=name, datatype="FP32", shape=values.shape)
    response.raw_output_contents.append(raw)


def _softmax(logits: Logits) -> Logits:
    """Return the probabilities [B, K] of logits [B, K]."""
    powers: Logits = np.exp(logits - np.maximum.reduce(logits, axis=1, keepdims=True))
    powers /= np.add.reduce(powers, axis=1, keepdims=True)
    return powers


def describe_metadata(model: VisionModel) -> pb.ModelMetadataResponse:
    """Return the names, types and shapes of a model's inputs and outputs."""
    tensor = pb.ModelMetadataResponse.TensorMetadata
    manifest = model.bundle.manifest
    return pb.ModelMetadataResponse(
        name=model.name,
        versions=[model.version],
        platform=PLATFORM,
        inputs=[tensor(name=INPUT, datatype="FP32", shape=[-1, *model.reader.shape])],
        outputs=[tensor(name="logits", datatype="FP32", shape=[-1, len(manifest.labels)])],
        properties={
            "labels": json.dumps(manifest.labels),
            "input_datatypes": "FP32 preprocessed [B,C,H,W]; UINT8 pixels [B,C,H,W]; "
            "BYTES PNG or JPEG files [B]",
            "outputs_on_demand": "probabilities, labels",
            "mean": json.dumps(manifest.preprocessing.mean),
            "std": json.dumps(manifest.preprocessing.std),
            "variants": str(len(model.variants)),
        },
    )


def describe_config(model: VisionModel) -> model_config_pb2.ModelConfig:
    """Return the configuration of a model that clients of the protocol read."""
    kinds = model_config_pb2.DataType
    classes = len(model.bundle.manifest.labels)
    return model_config_pb2.ModelConfig(
        name=model.name,
        platform=PLATFORM,
        backend=PLATFORM,
        max_batch_size=model.scheduler.planner.latency.view.max_batch_size,
        input=[
            model_config_pb2.ModelInput(
                name=INPUT, data_type=kinds.TYPE_FP32, dims=model.reader.shape
            )
        ],
        output=[
            model_config_pb2.ModelOutput(name="logits", data_type=kinds.TYPE_FP32, dims=[classes])
        ],
        dynamic_batching=model_config_pb2.ModelDynamicBatching(),
    )


def describe_statistics(model: VisionModel) -> pb.ModelStatistics:
    """Return the number and the total time of a model's requests and batches since its start."""
    counts = model.scheduler.in_flight.statistics
    return pb.ModelStatistics(
        name=model.name,
        version=model.version,
        last_inference=counts.last_inference_ms,
        inference_count=counts.inferences,
        execution_count=sum(total.count for total in counts.batches.values()),
        inference_stats=pb.InferStatistics(
            success=_duration(counts.success),
            fail=_duration(counts.fail),
            queue=_duration(counts.queue),
            compute_infer=_duration(counts.compute),
        ),
        batch_stats=[
            pb.InferBatchStatistics(batch_size=batch_size, compute_infer=_duration(total))
            for batch_size, total in sorted(counts.batches.items())
        ],
    )


def _duration(total: Total) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=total.count, ns=round(1e9 * total.seconds))

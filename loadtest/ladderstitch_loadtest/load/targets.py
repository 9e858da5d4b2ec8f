"""What a load test calls: our own API, or any server of the Open Inference Protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import grpc
import numpy as np

from ladderstitch.client import infer_request
from ladderstitch.oip import grpc_service_pb2 as oip
from ladderstitch.v1 import inference_pb2 as pb

Kind = Literal["ladderstitch", "oip"]
ITEM_BYTES = {
    "UINT8": 1,
    "INT8": 1,
    "BOOL": 1,
    "FP16": 2,
    "BF16": 2,
    "INT16": 2,
    "UINT16": 2,
    "INT32": 4,
    "UINT32": 4,
    "FP32": 4,
    "INT64": 8,
    "UINT64": 8,
    "FP64": 8,
}


@dataclass(frozen=True, slots=True)
class TargetAnswer:
    """What a server says of one answer, seconds; NaN and -1 where it says nothing."""

    total_s: float
    queue_s: float
    compute_s: float
    variant: int
    quality: float
    rows: int


class Target(Protocol):
    """A method to call, the bytes to send for a budget, and how to read what comes back."""

    @property
    def method(self) -> str: ...
    def message(self, budget_s: float) -> bytes: ...
    def read(self, answer: bytes) -> TargetAnswer: ...


@dataclass(frozen=True, slots=True)
class Native:
    """`ladderstitch.v1`: budgets travel with the request, as limits if `hard`."""

    shape: tuple[int, ...]
    hard: bool
    method: str = "/ladderstitch.v1.InferenceService/Infer"

    def message(self, budget_s: float) -> bytes:
        image = np.random.default_rng(0).integers(0, 256, self.shape).astype(np.uint8)
        return infer_request(image, budget_s=budget_s, hard=self.hard).SerializeToString()

    def read(self, answer: bytes) -> TargetAnswer:
        cost = pb.InferResponse.FromString(answer).accounting
        return TargetAnswer(
            cost.total_us / 1e6,
            cost.queue_us / 1e6,
            cost.compute_us / 1e6,
            cost.variant_id,
            cost.quality,
            cost.batch_size,
        )


@dataclass(frozen=True, slots=True)
class PlainOip:
    """Any OIP server; zeros for every input, quality 1 for every answer, the clock is ours."""

    model: str
    inputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    method: str = "/inference.GRPCInferenceService/ModelInfer"

    def message(self, budget_s: float) -> bytes:
        request = oip.ModelInferRequest(model_name=self.model)
        for name, kind, shape in self.inputs:
            request.inputs.add(name=name, datatype=kind, shape=shape)
            request.raw_input_contents.append(bytes(int(np.prod(shape)) * ITEM_BYTES[kind]))
        return request.SerializeToString()

    def read(self, answer: bytes) -> TargetAnswer:
        oip.ModelInferResponse.FromString(answer)
        return TargetAnswer(float("nan"), float("nan"), float("nan"), -1, 1.0, 1)


def find_target(address: str, kind: Kind, model: str, *, hard: bool) -> Target:
    """Ask the server what it takes; raises `ValueError` for inputs that cannot be made up."""
    with grpc.insecure_channel(address) as channel:
        if kind == "ladderstitch":
            get = channel.unary_unary("/ladderstitch.v1.InferenceService/GetModel")
            request = pb.GetModelRequest(model_name=model).SerializeToString()
            inputs = pb.GetModelResponse.FromString(get(request, timeout=10)).preprocessing
            return Native((1, inputs.channels, inputs.height, inputs.width), hard)
        ask = channel.unary_unary("/inference.GRPCInferenceService/ModelMetadata")
        question = oip.ModelMetadataRequest(name=model).SerializeToString()
        metadata = oip.ModelMetadataResponse.FromString(ask(question, timeout=10))
    for tensor in metadata.inputs:
        if tensor.datatype not in ITEM_BYTES:
            raise ValueError(
                f"input {tensor.name!r}: expected one of {sorted(ITEM_BYTES)}, "
                f"got {tensor.datatype}"
            )
    inputs_of = tuple(
        (tensor.name, tensor.datatype, tuple(max(1, size) for size in tensor.shape))
        for tensor in metadata.inputs
    )
    return PlainOip(metadata.name, inputs_of)

"""Servers that a load test sends images to: ladderstitch, or any OIP server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import grpc
import numpy as np

from ladderstitch.client import infer_request
from ladderstitch.oip import grpc_service_pb2 as oip
from ladderstitch.v1 import inference_pb2 as pb

TargetKind = Literal["ladderstitch", "oip"]
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
TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class TargetReply:
    """What a server reports with an answer; NaN seconds and variant -1 if it reports nothing."""

    total_s: float
    queue_s: float
    compute_s: float
    variant: int
    quality: float
    batch_size: int


class Target(Protocol):
    """A gRPC method, the message to send for a budget, and how to parse the reply."""

    @property
    def method(self) -> str:
        """The full name of the gRPC method."""

    def message(self, budget_s: float) -> bytes:
        """Return the serialised request with this budget."""

    def parse(self, reply: bytes) -> TargetReply:
        """Return what the server reports with its answer."""


@dataclass(frozen=True, slots=True)
class NativeTarget:
    """A `ladderstitch.v1` server; each request carries its budget, as a hard deadline if `hard`.

    `shape` is that of the images, [N, C, H, W].
    """

    shape: tuple[int, ...]
    hard: bool
    method: str = "/ladderstitch.v1.InferenceService/Infer"

    def message(self, budget_s: float) -> bytes:
        """Return the serialised request for the images with this budget."""
        images = np.random.default_rng(0).integers(0, 256, self.shape).astype(np.uint8)
        return infer_request(images, budget_s=budget_s, hard=self.hard).SerializeToString()

    def parse(self, reply: bytes) -> TargetReply:
        """Return the accounting of the answer."""
        accounting = pb.InferResponse.FromString(reply).accounting
        return TargetReply(
            accounting.total_us / 1e6,
            accounting.queue_us / 1e6,
            accounting.compute_us / 1e6,
            accounting.variant_id,
            accounting.quality,
            accounting.batch_size,
        )


@dataclass(frozen=True, slots=True)
class OipTarget:
    """Any server of the Open Inference Protocol.

    Every input is zeros, every answer has quality 1, and time is measured by the caller. `inputs`
    holds (name, data type, shape).
    """

    model: str
    inputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    method: str = "/inference.GRPCInferenceService/ModelInfer"

    def message(self, budget_s: float) -> bytes:
        """Return the serialised request; the protocol has no budgets."""
        request = oip.ModelInferRequest(model_name=self.model)
        for name, kind, shape in self.inputs:
            request.inputs.add(name=name, datatype=kind, shape=shape)
            request.raw_input_contents.append(bytes(int(np.prod(shape)) * ITEM_BYTES[kind]))
        return request.SerializeToString()

    def parse(self, reply: bytes) -> TargetReply:
        """Return a reply without times, after checking that it is a `ModelInferResponse`."""
        oip.ModelInferResponse.FromString(reply)
        return TargetReply(float("nan"), float("nan"), float("nan"), -1, 1.0, 1)


def find_target(
    address: str, kind: TargetKind, model: str, *, hard: bool, images: int = 1
) -> Target:
    """Return the target for a model, with the input shapes that the server reports.

    A request has `images` images if the target is a ladderstitch server, else one. An empty `model`
    is a ladderstitch server's only model. Raises `ValueError` for an input data type that has no
    zeros of fixed size, and `grpc.RpcError` if the server does not answer.
    """
    with grpc.insecure_channel(address) as channel:
        if kind == "ladderstitch":
            return _native_target(channel, model, hard, images)
        return _oip_target(channel, model)


def _native_target(channel: grpc.Channel, model: str, hard: bool, images: int) -> NativeTarget:
    call = channel.unary_unary("/ladderstitch.v1.InferenceService/GetModel")
    request = pb.GetModelRequest(model_name=model).SerializeToString()
    inputs = pb.GetModelResponse.FromString(call(request, timeout=TIMEOUT_S)).preprocessing
    return NativeTarget((images, inputs.channels, inputs.height, inputs.width), hard)


def _oip_target(channel: grpc.Channel, model: str) -> OipTarget:
    call = channel.unary_unary("/inference.GRPCInferenceService/ModelMetadata")
    request = oip.ModelMetadataRequest(name=model).SerializeToString()
    metadata = oip.ModelMetadataResponse.FromString(call(request, timeout=TIMEOUT_S))
    for tensor in metadata.inputs:
        if tensor.datatype not in ITEM_BYTES:
            raise ValueError(
                f"input {tensor.name!r}: expected one of {sorted(ITEM_BYTES)}, "
                f"got {tensor.datatype}"
            )
    inputs = tuple(
        (tensor.name, tensor.datatype, tuple(max(1, size) for size in tensor.shape))
        for tensor in metadata.inputs
    )
    return OipTarget(metadata.name, inputs)

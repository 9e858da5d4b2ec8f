"""What a request of the Open Inference Protocol asks for in its parameters."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from ladderstitch.api.deadlines import LatencyBudget, seconds_from_us
from ladderstitch.api.validation import checked_priority, checked_quality
from ladderstitch.errors import InvalidArgument
from ladderstitch.oip import grpc_service_pb2 as pb
from ladderstitch.scheduling.requests import Logits, Pixels
from ladderstitch.vision.preprocessing import ImageReader


@dataclass(slots=True)
class RequestOptions:
    """What a request's parameters ask for."""

    deadlines: list[LatencyBudget]
    min_quality: float = 0.0
    variant: int | None = None
    priority: int = 0


def read_parameters(
    request: pb.ModelInferRequest, wishes: RequestOptions, others: Collection[str] = ()
) -> None:
    """Fill in what the parameters ask for; `others` are left to the caller, those of Triton are
    ignored, unknown ones refused."""
    hard = _int_or_bool(request, "hard_deadline") or 0
    for name in request.parameters:
        match name:
            case "latency_budget_us":
                seconds = seconds_from_us(name, integer(request, name))
                wishes.deadlines.append(LatencyBudget(seconds, name, bool(hard)))
            case "timeout":
                seconds = seconds_from_us(name, integer(request, name))
                wishes.deadlines.append(LatencyBudget(seconds, name, hard=True))
            case "variant_id":
                wishes.variant = integer(request, name)
            case "priority":
                wishes.priority = checked_priority(integer(request, name))
            case "min_quality":
                wishes.min_quality = checked_quality(number(request, name))
            case "hard_deadline":
                if "latency_budget_us" not in request.parameters:
                    raise InvalidArgument(
                        name, "expected latency_budget_us to be set along with it"
                    )
            case "binary_data_output":
                pass  # gRPC answers are binary anyway
            case _ if name not in others and not name.startswith("triton_"):
                raise InvalidArgument("parameters", f"unknown parameter {name[:80]!r}")


def _int_or_bool(request: pb.ModelInferRequest, name: str) -> int | None:
    if name not in request.parameters:
        return None
    parameter = request.parameters[name]
    kind = parameter.WhichOneof("parameter_choice")
    if kind not in ("bool_param", "int64_param", "uint64_param"):
        raise InvalidArgument(name, f"expected an integer or boolean parameter, got {kind}")
    return int(getattr(parameter, kind))


def integer(request: pb.ModelInferRequest, name: str) -> int:
    """A parameter's value; raises `InvalidArgument` for another kind."""
    parameter = request.parameters[name]
    kind = parameter.WhichOneof("parameter_choice")
    if kind not in ("int64_param", "uint64_param"):
        raise InvalidArgument(name, f"expected an integer parameter, got {kind}")
    return int(getattr(parameter, kind))


def number(request: pb.ModelInferRequest, name: str) -> float:
    """A real number; clients that cannot send doubles send it as text."""
    parameter = request.parameters[name]
    kind = parameter.WhichOneof("parameter_choice")
    if kind is None or kind == "bool_param":
        raise InvalidArgument(name, f"expected a number, got {kind}")
    try:
        return float(getattr(parameter, kind))
    except ValueError:
        raise InvalidArgument(
            name, f"expected a number, got {parameter.string_param[:80]!r}"
        ) from None


INPUT = "images"


async def read_images(
    request: pb.ModelInferRequest, reader: ImageReader, max_batch_size: int
) -> Pixels:
    """[N, C, H, W] of the one input; raises `InvalidArgument` naming what is wrong with it."""
    if len(request.inputs) != 1 or request.inputs[0].name != INPUT:
        names = [tensor.name[:80] for tensor in request.inputs]
        raise InvalidArgument("inputs", f"expected exactly one input named {INPUT!r}, got {names}")
    tensor, raw = request.inputs[0], request.raw_input_contents
    typed = tensor.HasField("contents")
    if typed == bool(raw) or len(raw) > 1:
        raise InvalidArgument(INPUT, "expected either one raw content or typed contents")
    if tensor.datatype == "BYTES":
        files = list(tensor.contents.bytes_contents) if typed else split_bytes(INPUT, raw[0])
        return await _pictures(tensor, files, reader, max_batch_size)
    data = _typed_bytes(tensor) if typed else raw[0]
    return reader.tensor(INPUT, tensor.datatype, tensor.shape, data)


def _typed_bytes(tensor: pb.ModelInferRequest.InferInputTensor) -> bytes:
    if tensor.datatype == "FP32":
        return np.asarray(tensor.contents.fp32_contents, "<f4").tobytes()
    if tensor.datatype == "UINT8":
        values = np.asarray(tensor.contents.uint_contents, np.uint32)
        if (values > 255).any():
            raise InvalidArgument(f"{INPUT}.contents", "expected UINT8 values of 0 to 255")
        return values.astype(np.uint8).tobytes()
    raise InvalidArgument(
        f"{INPUT}.datatype", f"expected FP32, UINT8 or BYTES, got {tensor.datatype!r}"
    )


async def _pictures(
    tensor: pb.ModelInferRequest.InferInputTensor,
    files: list[bytes],
    reader: ImageReader,
    max_batch_size: int,
) -> Pixels:
    shape = list(tensor.shape)
    if shape not in ([len(files)], [len(files), 1]):
        raise InvalidArgument(f"{INPUT}.shape", f"expected [{len(files)}], got {shape}")
    if not 1 <= len(files) <= max_batch_size:
        raise InvalidArgument(INPUT, f"expected 1 to {max_batch_size} pictures, got {len(files)}")
    return np.concatenate([await reader.encoded(INPUT, file) for file in files])


def split_bytes(name: str, raw: bytes) -> list[bytes]:
    """The elements of a raw BYTES tensor: each a little-endian length and that many bytes.

    Raises `InvalidArgument` if they do not add up.
    """
    files, position = [], 0
    while position < len(raw):
        length = int.from_bytes(raw[position : position + 4], "little")
        position += 4
        if position + length > len(raw):
            raise InvalidArgument(f"{name}.data", "the length of an element runs past the end")
        files.append(raw[position : position + length])
        position += length
    return files


def softmax(logits: Logits) -> Logits:
    """[N, K] -> [N, K] probabilities."""
    powers: Logits = np.exp(logits - np.maximum.reduce(logits, axis=1, keepdims=True))
    powers /= np.add.reduce(powers, axis=1, keepdims=True)
    return powers

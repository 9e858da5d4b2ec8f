"""Parameters and raw contents of requests of the protocol, for models of any kind."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ladderstitch.api.deadlines import LatencyBudget, seconds_from_us
from ladderstitch.errors import InvalidArgument
from ladderstitch.oip import grpc_service_pb2 as pb
from ladderstitch.scheduling.requests import check_priority, check_quality

PLATFORM = "ladderstitch"
"""Platform and backend that all models report."""

InputTensor = pb.ModelInferRequest.InferInputTensor


@dataclass(slots=True)
class RequestOptions:
    """The options in the parameters of a request; `variant` is None if the scheduler chooses."""

    budgets: list[LatencyBudget]
    min_quality: float = 0.0
    variant: int | None = None
    priority: int = 0


def read_parameters(
    request: pb.ModelInferRequest, budgets: list[LatencyBudget], others: Collection[str] = ()
) -> RequestOptions:
    """Return the options in the parameters; their budgets are appended to `budgets`.

    Parameters in `others` are left to the caller, and those of Triton are ignored. Raises
    `InvalidArgument` for unknown parameters and for wrong values.
    """
    options = RequestOptions(budgets)
    hard = _read_flag(request, "hard_deadline")
    for name in request.parameters:
        match name:
            case "latency_budget_us":
                seconds = seconds_from_us(name, integer_parameter(request, name))
                options.budgets.append(LatencyBudget(seconds, name, hard))
            case "timeout":
                seconds = seconds_from_us(name, integer_parameter(request, name))
                options.budgets.append(LatencyBudget(seconds, name, hard=True))
            case "variant_id":
                options.variant = integer_parameter(request, name)
            case "priority":
                options.priority = integer_parameter(request, name)
                check_priority(options.priority)
            case "min_quality":
                options.min_quality = number_parameter(request, name)
                check_quality(options.min_quality)
            case "hard_deadline":
                if "latency_budget_us" not in request.parameters:
                    raise InvalidArgument(
                        name, "expected latency_budget_us to be set along with it"
                    )
            case "binary_data_output":
                pass  # gRPC answers are always binary
            case _ if name not in others and not name.startswith("triton_"):
                raise InvalidArgument("parameters", f"expected known parameters, got {name[:80]!r}")
    return options


def _read_flag(request: pb.ModelInferRequest, name: str) -> bool:
    """Return a boolean parameter, which may be sent as an integer; False without it."""
    if name not in request.parameters:
        return False
    parameter = request.parameters[name]
    kind = parameter.WhichOneof("parameter_choice")
    if kind not in ("bool_param", "int64_param", "uint64_param"):
        raise InvalidArgument(name, f"expected an integer or boolean parameter, got {kind}")
    return bool(getattr(parameter, kind))


def integer_parameter(request: pb.ModelInferRequest, name: str) -> int:
    """Return the value of a parameter; raises `InvalidArgument` if it is not an integer."""
    parameter = request.parameters[name]
    kind = parameter.WhichOneof("parameter_choice")
    if kind not in ("int64_param", "uint64_param"):
        raise InvalidArgument(name, f"expected an integer parameter, got {kind}")
    return int(getattr(parameter, kind))


def number_parameter(request: pb.ModelInferRequest, name: str) -> float:
    """Return the value of a parameter; raises `InvalidArgument` if it is not a number.

    Clients that cannot send doubles send numbers as text.
    """
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


def only_input(request: pb.ModelInferRequest, name: str) -> InputTensor:
    """Return the request's input tensor.

    Raises `InvalidArgument` unless there is exactly one input, it has this name, and it has either
    typed contents or one raw content.
    """
    if len(request.inputs) != 1 or request.inputs[0].name != name:
        names = [tensor.name[:80] for tensor in request.inputs]
        raise InvalidArgument("inputs", f"expected exactly one input named {name!r}, got {names}")
    tensor, num_raw = request.inputs[0], len(request.raw_input_contents)
    if tensor.HasField("contents") == bool(num_raw) or num_raw > 1:
        typed = "typed contents" if tensor.HasField("contents") else "no typed contents"
        raise InvalidArgument(
            name, f"expected either one raw content or typed contents, got {num_raw} and {typed}"
        )
    return tensor


def bytes_elements(request: pb.ModelInferRequest, tensor: InputTensor) -> list[bytes]:
    """Return the elements of a BYTES tensor; raises `InvalidArgument` if it is malformed."""
    if tensor.HasField("contents"):
        return list(tensor.contents.bytes_contents)
    return _split_bytes(tensor.name, request.raw_input_contents[0])


def _split_bytes(name: str, raw: bytes) -> list[bytes]:
    """Return the elements of raw BYTES, each of which follows its little-endian uint32 length."""
    elements, position = [], 0
    while position < len(raw):
        length = int.from_bytes(raw[position : position + 4], "little")
        position += 4
        if position + length > len(raw):
            raise InvalidArgument(
                f"{name}.data", f"expected {position + length} bytes or more, got {len(raw)}"
            )
        elements.append(raw[position : position + length])
        position += length
    return elements

"""What a request of the Open Inference Protocol asks for in its parameters."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ladderstitch.api.deadlines import Deadline, seconds_from_us
from ladderstitch.api.validation import checked_priority, checked_quality
from ladderstitch.errors import BadInput
from ladderstitch.oip import grpc_service_pb2 as pb


@dataclass(slots=True)
class Wishes:
    """What a request's parameters ask for."""

    deadlines: list[Deadline]
    min_quality: float = 0.0
    stitch: int | None = None
    priority: int = 0


def read_parameters(
    request: pb.ModelInferRequest, wishes: Wishes, others: Collection[str] = ()
) -> None:
    """Fill in what the parameters ask for; `others` are left to the caller, those of Triton are
    ignored, unknown ones refused."""
    hard = _int_or_bool(request, "hard_deadline") or 0
    for name in request.parameters:
        match name:
            case "latency_budget_us":
                seconds = seconds_from_us(name, integer(request, name))
                wishes.deadlines.append(Deadline(seconds, name, bool(hard)))
            case "timeout":
                seconds = seconds_from_us(name, integer(request, name))
                wishes.deadlines.append(Deadline(seconds, name, hard=True))
            case "stitch_id":
                wishes.stitch = integer(request, name)
            case "priority":
                wishes.priority = checked_priority(integer(request, name))
            case "min_quality":
                wishes.min_quality = checked_quality(number(request, name))
            case "hard_deadline":
                if "latency_budget_us" not in request.parameters:
                    raise BadInput(name, "expected latency_budget_us to be set along with it")
            case "binary_data_output":
                pass  # gRPC answers are binary anyway
            case _ if name not in others and not name.startswith("triton_"):
                raise BadInput("parameters", f"unknown parameter {name[:80]!r}")


def _int_or_bool(request: pb.ModelInferRequest, name: str) -> int | None:
    if name not in request.parameters:
        return None
    parameter = request.parameters[name]
    kind = parameter.WhichOneof("parameter_choice")
    if kind not in ("bool_param", "int64_param", "uint64_param"):
        raise BadInput(name, f"expected an integer or boolean parameter, got {kind}")
    return int(getattr(parameter, kind))


def integer(request: pb.ModelInferRequest, name: str) -> int:
    """A parameter's value; raises `BadInput` for another kind."""
    parameter = request.parameters[name]
    kind = parameter.WhichOneof("parameter_choice")
    if kind not in ("int64_param", "uint64_param"):
        raise BadInput(name, f"expected an integer parameter, got {kind}")
    return int(getattr(parameter, kind))


def number(request: pb.ModelInferRequest, name: str) -> float:
    """A real number; clients that cannot send doubles send it as text."""
    parameter = request.parameters[name]
    kind = parameter.WhichOneof("parameter_choice")
    if kind is None or kind == "bool_param":
        raise BadInput(name, f"expected a number, got {kind}")
    try:
        return float(getattr(parameter, kind))
    except ValueError:
        raise BadInput(name, f"expected a number, got {parameter.string_param[:80]!r}") from None

"""Parameters and raw contents of requests of the protocol, for models of any kind."""

from __future__ import annotations

from dataclasses import dataclass

from ladderstitch.api.deadlines import LatencyBudget, seconds_from_us
from ladderstitch.api.oip.options import Kind, check_parameters
from ladderstitch.errors import InvalidArgument
from ladderstitch.oip import grpc_service_pb2 as pb
from ladderstitch.scheduling.requests import check_confidence, check_priority, check_quality

PLATFORM = "ladderstitch"
"""Platform and backend that all models report."""

MAX_LISTED = 4
"""Maximum number of names that one error message lists."""

InputTensor = pb.ModelInferRequest.InferInputTensor


@dataclass(slots=True)
class RequestOptions:
    """The options in the parameters of a request; `variant` is None if the scheduler chooses."""

    budgets: list[LatencyBudget]
    min_quality: float = 0.0
    variant: int | None = None
    priority: int = 0
    min_confidence: float = 0.0


def read_parameters(
    request: pb.ModelInferRequest, budgets: list[LatencyBudget], kind: Kind
) -> RequestOptions:
    """Return the options in the parameters that models of all kinds have.

    Their budgets are appended to `budgets`; `check_parameters` says which other parameters pass.
    Raises `InvalidArgument` for those that do not, and for wrong values.
    """
    check_parameters("request", request.parameters, kind)
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
            case "min_confidence":
                options.min_confidence = number_parameter(request, name)
                check_confidence(options.min_confidence)
            case "hard_deadline":
                if "latency_budget_us" not in request.parameters:
                    raise InvalidArgument(
                        name, "expected latency_budget_us to be set along with it"
                    )
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
        names = [tensor.name[:80] for tensor in request.inputs[:MAX_LISTED]]
        raise InvalidArgument(
            "inputs",
            f"expected exactly one input named {name!r}, got {len(request.inputs)}: {names}",
        )
    tensor, num_raw = request.inputs[0], len(request.raw_input_contents)
    check_parameters("input", tensor.parameters)
    if tensor.HasField("contents") == bool(num_raw) or num_raw > 1:
        typed = "typed contents" if tensor.HasField("contents") else "no typed contents"
        raise InvalidArgument(
            name, f"expected either one raw content or typed contents, got {num_raw} and {typed}"
        )
    return tensor


def bytes_elements(
    request: pb.ModelInferRequest, tensor: InputTensor, max_elements: int
) -> list[bytes]:
    """Return the elements of a BYTES tensor.

    Raises `InvalidArgument` if it is malformed or has more than `max_elements`.
    """
    if not tensor.HasField("contents"):
        return _split_bytes(tensor.name, request.raw_input_contents[0], max_elements)
    if (got := len(tensor.contents.bytes_contents)) > max_elements:
        raise InvalidArgument(tensor.name, f"expected 1 to {max_elements} elements, got {got}")
    return list(tensor.contents.bytes_contents)


def _split_bytes(name: str, raw: bytes, max_elements: int) -> list[bytes]:
    """Return the elements of raw BYTES, each of which follows its little-endian uint32 length."""
    elements: list[bytes] = []
    position = 0
    while position < len(raw):
        if len(elements) == max_elements:
            raise InvalidArgument(name, f"expected 1 to {max_elements} elements, got more")
        length = int.from_bytes(raw[position : position + 4], "little")
        position += 4
        if position + length > len(raw):
            raise InvalidArgument(
                f"{name}.data", f"expected {position + length} bytes or more, got {len(raw)}"
            )
        elements.append(raw[position : position + length])
        position += length
    return elements


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output to return; with `num_classes` above 0, its best classes instead of its values."""

    name: str
    num_classes: int = 0


def requested_outputs(
    request: pb.ModelInferRequest, known: tuple[str, ...], default: tuple[str, ...], kind: Kind
) -> tuple[RequestedOutput, ...]:
    """Return the requested outputs, those in `default` if the request names none.

    Raises `InvalidArgument` for an output that is not in `known` or that is requested twice, and
    for parameters of outputs that are not supported.
    """
    outputs: dict[str, RequestedOutput] = {}
    for output in request.outputs:
        if output.name not in known:
            raise InvalidArgument(
                "outputs", f"expected some of {list(known)}, got {output.name[:80]!r}"
            )
        if output.name in outputs:
            raise InvalidArgument("outputs", f"expected each once, got {output.name!r} twice")
        check_parameters("output", output.parameters, kind)
        outputs[output.name] = RequestedOutput(output.name, _class_count(output))
    return tuple(outputs.values()) or tuple(map(RequestedOutput, default))


def _class_count(output: pb.ModelInferRequest.InferRequestedOutputTensor) -> int:
    if "classification" not in output.parameters:
        return 0
    parameter = output.parameters["classification"]
    kind = parameter.WhichOneof("parameter_choice")
    if kind != "int64_param" or parameter.int64_param < 0:
        got = parameter.int64_param if kind == "int64_param" else kind
        raise InvalidArgument(
            "outputs.parameters.classification", f"expected an int64_param of 0 or more, got {got}"
        )
    return parameter.int64_param


def bytes_contents(elements: list[bytes]) -> bytes:
    """Return the raw contents of a BYTES tensor: each element after its little-endian length."""
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)

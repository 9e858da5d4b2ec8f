"""The calls of both clients: for each method, the message to send and how to read the reply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypedDict, TypeVar, Unpack

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ladderstitch.client.channel import Credentials, open_channel
from ladderstitch.client.messages import (
    Image,
    InferOptions,
    Prediction,
    infer_request,
    microseconds,
)
from ladderstitch.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    generation_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)

DEFAULT_TIMEOUT_S = 30.0
LOAD_TIMEOUT_S = 600.0
"""Default gRPC deadline of `load_model`, which warms the model up."""
POLICY_PREFIX = "POLICY_NAME_"
POLICY_NUMBERS: dict[str, admin_pb2.PolicyName.ValueType] = {
    name.removeprefix(POLICY_PREFIX).lower(): number
    for name, number in admin_pb2.PolicyName.items()
    if number != admin_pb2.POLICY_NAME_UNSPECIFIED
}
"""The numbers of the policies in messages, by name."""

NO_SETTINGS = ("revision", "unfit_models")
"""Fields of the message `Scheduling` that are no settings."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class UnaryCall(Generic[Result]):
    """A call with one reply: the stub and its method, the message, and how to read the reply."""

    stub: str
    method: str
    request: Message
    read: Callable[[Any], Result]


class BaseClient:
    """What both clients share: the channel, its stubs, the token and the default deadline."""

    def __init__(
        self,
        implementation: Any,
        address: str,
        timeout_s: float,
        credentials: Credentials,
        retry_policy: str | None,
    ) -> None:
        """Open a channel; `implementation` is `grpc` or `grpc.aio`."""
        self.timeout_s = timeout_s
        self.channel = open_channel(implementation, address, credentials, retry_policy)
        self.inference: Any = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.generation: Any = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.admin: Any = admin_pb2_grpc.AdminServiceStub(self.channel)
        self._health: Any = health_pb2_grpc.HealthStub(self.channel)
        self._metadata = credentials.metadata

    def _start(self, call: UnaryCall[Any], timeout_s: float | None) -> Any:
        """Start a call; returns what its stub returns: a reply or an awaitable one."""
        method = getattr(getattr(self, call.stub), call.method)
        return method(call.request, timeout=timeout_s or self.timeout_s, metadata=self._metadata)


def predict(image: Image, **options: Unpack[InferOptions]) -> UnaryCall[Prediction]:
    """Return a call of `InferenceService.Infer`."""
    request = infer_request(image, **options)
    return UnaryCall("inference", "Infer", request, Prediction.from_response)


def list_models() -> UnaryCall[inference_pb2.ListModelsResponse]:
    """Return a call of `InferenceService.ListModels`."""
    return UnaryCall("inference", "ListModels", inference_pb2.ListModelsRequest(), _whole_reply)


def get_model(model: str) -> UnaryCall[inference_pb2.GetModelResponse]:
    """Return a call of `InferenceService.GetModel`."""
    request = inference_pb2.GetModelRequest(model_name=model)
    return UnaryCall("inference", "GetModel", request, _whole_reply)


def check_budget(
    budget_s: float | None, min_quality: float | None, model: str
) -> UnaryCall[inference_pb2.CheckBudgetResponse]:
    """Return a call of `InferenceService.CheckBudget`."""
    request = inference_pb2.CheckBudgetRequest(
        model_name=model, latency_budget_us=microseconds(budget_s), min_quality=min_quality
    )
    return UnaryCall("inference", "CheckBudget", request, _whole_reply)


def get_scheduling(model: str) -> UnaryCall[admin_pb2.Scheduling]:
    """Return a call of `AdminService.GetScheduling`."""
    request = admin_pb2.GetSchedulingRequest(model_name=model)
    return UnaryCall("admin", "GetScheduling", request, _scheduling)


class SchedulingChanges(TypedDict, total=False):
    """The changes of `update_scheduling`: settings of the message `Scheduling`, and `unpin`.

    A field that is None stays as it is. `policy` is a name such as `adaptive`; the name and the
    number of the message's enum (`POLICY_NAME_ADAPTIVE`, 5) are accepted, too. The policy
    `fixed` needs `fixed_variant`. `unpin` removes the pinned variant.
    """

    policy: str | int | None
    fixed_variant: int | None
    pinned_variant: int | None
    unpin: bool
    min_quality: float | None
    slackfit_buckets: int | None
    queue_limit_requests: int | None
    queue_limit_s: float | None
    attainment_probability: float | None
    priority_window_s: float | None
    overhead_s: float | None
    change_variants: bool | None
    cache_mode: str | None
    audit_share: float | None


def update_scheduling(
    model: str, **changes: Unpack[SchedulingChanges]
) -> UnaryCall[admin_pb2.Scheduling]:
    """Return a call of `AdminService.UpdateScheduling`.

    Raises `ValueError` for an unknown policy.
    """
    fields: dict[str, Any] = dict(changes)
    if isinstance(policy := changes.get("policy"), str):
        fields["policy"] = _find_policy_number(policy)
    request = admin_pb2.UpdateSchedulingRequest(model_name=model, **fields)
    return UnaryCall("admin", "UpdateScheduling", request, _scheduling)


def _find_policy_number(policy: str) -> int:
    for name, number in POLICY_NUMBERS.items():
        if policy in (name, POLICY_PREFIX + name.upper()):
            return number
    raise ValueError(f"policy: expected one of {', '.join(POLICY_NUMBERS)}, got {policy!r}")


def scheduling_settings(scheduling: admin_pb2.Scheduling) -> dict[str, object]:
    """Return the settings in a message by the names of their fields; unset ones are None."""
    policies = {number: name for name, number in POLICY_NUMBERS.items()}
    present = {field.name for field, _ in scheduling.ListFields()}
    fields = scheduling.DESCRIPTOR.fields_by_name
    values: dict[str, object] = {
        name: getattr(scheduling, name) if name in present or not field.has_presence else None
        for name, field in fields.items()
        if name not in NO_SETTINGS
    }
    return values | {"policy": policies.get(scheduling.policy, scheduling.policy)}


def load_model(bundle: str) -> UnaryCall[str]:
    """Return a call of `AdminService.LoadModel`."""
    request = admin_pb2.LoadModelRequest(bundle=bundle)
    return UnaryCall("admin", "LoadModel", request, lambda reply: str(reply.model_name))


def unload_model(model: str) -> UnaryCall[None]:
    """Return a call of `AdminService.UnloadModel`."""
    request = admin_pb2.UnloadModelRequest(model_name=model)
    return UnaryCall("admin", "UnloadModel", request, lambda reply: None)


def drain(announce_s: float) -> UnaryCall[bool]:
    """Return a call of `AdminService.Drain`."""
    request = admin_pb2.DrainRequest()
    request.announce.FromTimedelta(timedelta(seconds=announce_s))
    return UnaryCall("admin", "Drain", request, lambda reply: bool(reply.finished))


def health(service: str) -> UnaryCall[str]:
    """Return a call of `grpc.health.v1.Health.Check`."""
    name = health_pb2.HealthCheckResponse.ServingStatus.Name
    request = health_pb2.HealthCheckRequest(service=service)
    return UnaryCall("_health", "Check", request, lambda reply: str(name(reply.status)))


def _whole_reply(reply: Any) -> Any:
    return reply


def _scheduling(reply: Any) -> Any:
    return reply.scheduling

"""`ladderstitch.v1.AdminService`: the scheduling of a running model, and its end of service."""

from __future__ import annotations

from typing import Any

from ladderstitch.api.status import Context, statuses
from ladderstitch.api.validation import announce_seconds, checked_quality
from ladderstitch.errors import InvalidArgument
from ladderstitch.hosting.registry import AdminActions, ModelRegistry
from ladderstitch.scheduling.settings import POLICY_NAMES, ActiveSettings
from ladderstitch.v1 import admin_pb2 as pb
from ladderstitch.v1 import admin_pb2_grpc

POLICIES = {pb.PolicyName.Value(f"POLICY_NAME_{name.upper()}"): name for name in POLICY_NAMES}
NUMBERS = {name: number for number, name in POLICIES.items()}


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    def __init__(self, registry: ModelRegistry, control: AdminActions) -> None:
        self.registry = registry
        self.control = control

    @statuses
    async def GetScheduling(
        self, request: pb.GetSchedulingRequest, context: Context
    ) -> pb.GetSchedulingResponse:
        self.registry.vision_model(request.model_name)
        return pb.GetSchedulingResponse(scheduling=_message(self.registry.active_settings))

    @statuses
    async def UpdateScheduling(
        self, request: pb.UpdateSchedulingRequest, context: Context
    ) -> pb.UpdateSchedulingResponse:
        model = self.registry.find(request.model_name)
        changes = _changes(request)
        for field in ("fixed_variant", "pinned_variant"):
            variant = changes.get(field)
            if variant is not None and variant not in model.qualities:
                raise InvalidArgument(field, f"expected a variant of {model.name!r}, got {variant}")
        best = max(model.qualities.values())
        if changes.get("min_quality", 0) > best:
            raise InvalidArgument("min_quality", f"expected at most {best:.4f}, the best variant's")
        return pb.UpdateSchedulingResponse(scheduling=_message(await self.control.update(changes)))

    @statuses
    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        finished = await self.control.drain(announce_seconds(request.announce))
        return pb.DrainResponse(finished=finished)

    @statuses
    async def LoadModel(
        self, request: pb.LoadModelRequest, context: Context
    ) -> pb.LoadModelResponse:
        hosted = await self.control.load(request.bundle)
        return pb.LoadModelResponse(model_name=hosted.name, model_version=hosted.version)

    @statuses
    async def UnloadModel(
        self, request: pb.UnloadModelRequest, context: Context
    ) -> pb.UnloadModelResponse:
        await self.control.unload(request.model_name)
        return pb.UnloadModelResponse()


def _changes(request: pb.UpdateSchedulingRequest) -> dict[str, Any]:
    """The fields of `SchedulerSettings` that a request sets."""
    changes: dict[str, Any] = {}
    if request.policy != pb.POLICY_NAME_UNSPECIFIED:
        if request.policy not in POLICIES:
            raise InvalidArgument(
                "policy", f"expected one of {sorted(NUMBERS)}, got {request.policy}"
            )
        changes["policy"] = POLICIES[request.policy]
    fixed = changes.get("policy") == "fixed"
    if fixed != request.HasField("fixed_variant"):
        raise InvalidArgument(
            "fixed_variant", "expected it along with the policy FIXED, and only then"
        )
    if fixed:
        changes["fixed_variant"] = request.fixed_variant
    if request.unpin and request.HasField("pinned_variant"):
        raise InvalidArgument("unpin", "expected either unpin or pinned_variant, got both")
    if request.unpin:
        changes["pinned_variant"] = None
    if request.HasField("pinned_variant"):
        changes["pinned_variant"] = request.pinned_variant
    if request.HasField("min_quality"):
        changes["min_quality"] = checked_quality(request.min_quality)
    if request.HasField("slackfit_buckets"):
        if not 1 <= request.slackfit_buckets <= 4096:
            raise InvalidArgument(
                "slackfit_buckets", f"expected 1 to 4096, got {request.slackfit_buckets}"
            )
        changes["slackfit_buckets"] = request.slackfit_buckets
    return changes


def _message(live: ActiveSettings) -> pb.Scheduling:
    settings = live.settings
    fixed = settings.policy == "fixed"
    return pb.Scheduling(
        policy=NUMBERS[settings.policy],
        fixed_variant=settings.fixed_variant if fixed else None,
        pinned_variant=settings.pinned_variant,
        min_quality=settings.min_quality,
        slackfit_buckets=settings.slackfit_buckets,
        revision=live.revision,
    )

"""`ladderstitch.v1.AdminService`: the scheduling of a running model, and its end of service."""

from __future__ import annotations

from typing import Any

from ladderstitch.api.status import Context, statuses
from ladderstitch.api.validation import announce_seconds, checked_quality
from ladderstitch.errors import BadInput
from ladderstitch.hosting.registry import Control, Host
from ladderstitch.scheduling.settings import POLICY_NAMES, LiveSettings
from ladderstitch.v1 import admin_pb2 as pb
from ladderstitch.v1 import admin_pb2_grpc

POLICIES = {pb.PolicyName.Value(f"POLICY_NAME_{name.upper()}"): name for name in POLICY_NAMES}
NUMBERS = {name: number for number, name in POLICIES.items()}


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    def __init__(self, host: Host, control: Control) -> None:
        self.host = host
        self.control = control

    @statuses
    async def GetScheduling(
        self, request: pb.GetSchedulingRequest, context: Context
    ) -> pb.GetSchedulingResponse:
        self.host.model(request.model_name)
        return pb.GetSchedulingResponse(scheduling=_message(self.host.live))

    @statuses
    async def UpdateScheduling(
        self, request: pb.UpdateSchedulingRequest, context: Context
    ) -> pb.UpdateSchedulingResponse:
        model = self.host.find(request.model_name)
        changes = _changes(request)
        for field in ("stitch", "pinned_stitch"):
            stitch = changes.get(field)
            if stitch is not None and stitch not in model.qualities:
                named = "fixed_stitch" if field == "stitch" else field
                raise BadInput(named, f"expected a stitch of {model.name!r}, got {stitch}")
        best = max(model.qualities.values())
        if changes.get("min_quality", 0) > best:
            raise BadInput("min_quality", f"expected at most {best:.4f}, the best stitch's")
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
            raise BadInput("policy", f"expected one of {sorted(NUMBERS)}, got {request.policy}")
        changes["policy"] = POLICIES[request.policy]
    fixed = changes.get("policy") == "fixed"
    if fixed != request.HasField("fixed_stitch"):
        raise BadInput("fixed_stitch", "expected it along with the policy FIXED, and only then")
    if fixed:
        changes["stitch"] = request.fixed_stitch
    if request.unpin and request.HasField("pinned_stitch"):
        raise BadInput("unpin", "expected either unpin or pinned_stitch, got both")
    if request.unpin:
        changes["pinned_stitch"] = None
    if request.HasField("pinned_stitch"):
        changes["pinned_stitch"] = request.pinned_stitch
    if request.HasField("min_quality"):
        changes["min_quality"] = checked_quality(request.min_quality)
    if request.HasField("slackfit_buckets"):
        if not 1 <= request.slackfit_buckets <= 4096:
            raise BadInput(
                "slackfit_buckets", f"expected 1 to 4096, got {request.slackfit_buckets}"
            )
        changes["slackfit_buckets"] = request.slackfit_buckets
    return changes


def _message(live: LiveSettings) -> pb.Scheduling:
    settings = live.settings
    fixed = settings.policy == "fixed"
    return pb.Scheduling(
        policy=NUMBERS[settings.policy],
        fixed_stitch=settings.stitch if fixed else None,
        pinned_stitch=settings.pinned_stitch,
        min_quality=settings.min_quality,
        slackfit_buckets=settings.slackfit_buckets,
        revision=live.revision,
    )

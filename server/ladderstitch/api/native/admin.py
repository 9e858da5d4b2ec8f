"""`ladderstitch.v1.AdminService`: scheduling changes, loading and unloading models, draining."""

from __future__ import annotations

from typing import Any

from ladderstitch.api.deadlines import announce_seconds
from ladderstitch.api.status import Context, translate_errors
from ladderstitch.errors import InvalidArgument
from ladderstitch.hosting.registry import AdminActions, ModelRegistry
from ladderstitch.scheduling.requests import check_quality
from ladderstitch.scheduling.settings import POLICY_NAMES, ActiveSettings
from ladderstitch.v1 import admin_pb2 as pb
from ladderstitch.v1 import admin_pb2_grpc

POLICY_BY_NUMBER = {
    pb.PolicyName.Value(f"POLICY_NAME_{name.upper()}"): name for name in POLICY_NAMES
}
NUMBER_BY_POLICY = {name: number for number, name in POLICY_BY_NUMBER.items()}
MAX_SLACKFIT_BUCKETS = 4096


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """The servicer; `actions` carries out the changes, on all replicas where that applies."""

    def __init__(self, registry: ModelRegistry, actions: AdminActions) -> None:
        self.registry = registry
        self.actions = actions

    @translate_errors
    async def GetScheduling(
        self, request: pb.GetSchedulingRequest, context: Context
    ) -> pb.GetSchedulingResponse:
        """Return the active scheduling settings."""
        self.registry.vision_model(request.model_name)
        return pb.GetSchedulingResponse(scheduling=_build_message(self.registry.active_settings))

    @translate_errors
    async def UpdateScheduling(
        self, request: pb.UpdateSchedulingRequest, context: Context
    ) -> pb.UpdateSchedulingResponse:
        """Change the scheduling settings that are set; returns the active ones."""
        model = self.registry.find(request.model_name)
        changes = _read_changes(request)
        for field in ("fixed_variant", "pinned_variant"):
            variant = changes.get(field)
            if variant is not None and variant not in model.qualities:
                raise InvalidArgument(field, f"expected a variant of {model.name!r}, got {variant}")
        best = max(model.qualities.values())
        if changes.get("min_quality", 0) > best:
            raise InvalidArgument(
                "min_quality",
                f"expected at most {best:.4f}, the quality of the best variant, got "
                f"{changes['min_quality']}",
            )
        active = await self.actions.update(changes)
        return pb.UpdateSchedulingResponse(scheduling=_build_message(active))

    @translate_errors
    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        """Take the replica out of service; returns when its accepted requests have ended."""
        finished = await self.actions.drain(announce_seconds(request.announce))
        return pb.DrainResponse(finished=finished)

    @translate_errors
    async def LoadModel(
        self, request: pb.LoadModelRequest, context: Context
    ) -> pb.LoadModelResponse:
        """Load a model, or a new version of a loaded one; returns when it is warm."""
        model = await self.actions.load(request.bundle)
        return pb.LoadModelResponse(model_name=model.name, model_version=model.version)

    @translate_errors
    async def UnloadModel(
        self, request: pb.UnloadModelRequest, context: Context
    ) -> pb.UnloadModelResponse:
        """Unload a model; returns when its accepted requests have ended."""
        await self.actions.unload(request.model_name)
        return pb.UnloadModelResponse()


def _read_changes(request: pb.UpdateSchedulingRequest) -> dict[str, Any]:
    """Return the fields of `SchedulerSettings` that a request sets.

    Raises `InvalidArgument` for a value out of range and for fields that exclude each other.
    """
    changes: dict[str, Any] = _read_policy(request)
    if request.unpin and request.HasField("pinned_variant"):
        raise InvalidArgument("unpin", "expected either unpin or pinned_variant, got both")
    if request.unpin:
        changes["pinned_variant"] = None
    if request.HasField("pinned_variant"):
        changes["pinned_variant"] = request.pinned_variant
    if request.HasField("min_quality"):
        check_quality(request.min_quality)
        changes["min_quality"] = request.min_quality
    if request.HasField("slackfit_buckets"):
        buckets = request.slackfit_buckets
        if not 1 <= buckets <= MAX_SLACKFIT_BUCKETS:
            raise InvalidArgument(
                "slackfit_buckets", f"expected 1 to {MAX_SLACKFIT_BUCKETS}, got {buckets}"
            )
        changes["slackfit_buckets"] = buckets
    return changes


def _read_policy(request: pb.UpdateSchedulingRequest) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if request.policy != pb.POLICY_NAME_UNSPECIFIED:
        if request.policy not in POLICY_BY_NUMBER:
            raise InvalidArgument(
                "policy", f"expected one of {sorted(NUMBER_BY_POLICY)}, got {request.policy}"
            )
        changes["policy"] = POLICY_BY_NUMBER[request.policy]
    fixed = changes.get("policy") == "fixed"
    if fixed and not request.HasField("fixed_variant"):
        raise InvalidArgument("fixed_variant", "expected a variant for the policy fixed, got none")
    if not fixed and request.HasField("fixed_variant"):
        raise InvalidArgument(
            "fixed_variant",
            f"expected the policy fixed along with it, got {changes.get('policy', 'none')}",
        )
    if fixed:
        changes["fixed_variant"] = request.fixed_variant
    return changes


def _build_message(active: ActiveSettings) -> pb.Scheduling:
    settings = active.settings
    return pb.Scheduling(
        policy=NUMBER_BY_POLICY[settings.policy],
        fixed_variant=settings.fixed_variant if settings.policy == "fixed" else None,
        pinned_variant=settings.pinned_variant,
        min_quality=settings.min_quality,
        slackfit_buckets=settings.slackfit_buckets,
        revision=active.revision,
    )

"""`ladderstitch.v1.AdminService`: scheduling changes, loading and unloading models, draining."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from ladderstitch.api.deadlines import announce_seconds
from ladderstitch.api.status import Context, translate_errors
from ladderstitch.client.calls import POLICY_NUMBERS
from ladderstitch.errors import InvalidArgument
from ladderstitch.hosting.registry import AdminActions, LoadedModel, ModelRegistry
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.v1 import admin_pb2 as pb
from ladderstitch.v1 import admin_pb2_grpc

POLICY_BY_NUMBER = {number: name for name, number in POLICY_NUMBERS.items()}
FIELDS_OF_A_MODEL = ("fixed_variant", "pinned_variant", "min_quality")
"""Settings that are checked against the variants and qualities of one model."""


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """The servicer; `actions` carries out the changes, on all replicas where that applies."""

    def __init__(self, registry: ModelRegistry, actions: AdminActions) -> None:
        self.registry = registry
        self.actions = actions

    @translate_errors
    async def GetScheduling(
        self, request: pb.GetSchedulingRequest, context: Context
    ) -> pb.GetSchedulingResponse:
        """Return the active scheduling settings, which are those of all models."""
        if request.model_name:
            self.registry.find(request.model_name)
        return pb.GetSchedulingResponse(scheduling=_build_message(self.registry))

    @translate_errors
    async def UpdateScheduling(
        self, request: pb.UpdateSchedulingRequest, context: Context
    ) -> pb.UpdateSchedulingResponse:
        """Change the scheduling settings that are set, for all models; returns the active ones."""
        changes = _read_changes(request)
        self._check_ranges(changes)
        needs_model = any(changes.get(field) is not None for field in FIELDS_OF_A_MODEL)
        if request.model_name or needs_model:
            _check_model(self.registry.find(request.model_name), changes)
        await self.actions.update(changes)
        return pb.UpdateSchedulingResponse(scheduling=_build_message(self.registry))

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

    def _check_ranges(self, changes: dict[str, Any]) -> None:
        """Raise `InvalidArgument`, which names the field, if a value is out of range."""
        try:
            self.registry.active_settings.with_changes(changes)
        except ValidationError as error:
            first = error.errors()[0]
            field = str(first["loc"][0]) if first["loc"] else "policy"
            expected = first["msg"].replace("Input should be", "expected")
            raise InvalidArgument(field, f"{expected}, got {first['input']}") from None


def _check_model(model: LoadedModel, changes: dict[str, Any]) -> None:
    """Raise `InvalidArgument` if a change names a variant or a quality that the model lacks."""
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


def _read_changes(request: pb.UpdateSchedulingRequest) -> dict[str, Any]:
    """Return the fields of `SchedulerSettings` that a request sets.

    Raises `InvalidArgument` for an unknown policy and for fields that exclude each other.
    """
    settings = SchedulerSettings.model_fields.keys() - {"policy"}
    present = {field.name: value for field, value in request.ListFields()}
    changes = {name: present[name] for name in present.keys() & settings}
    if request.unpin and "pinned_variant" in changes:
        raise InvalidArgument("unpin", "expected either unpin or pinned_variant, got both")
    if request.unpin:
        changes["pinned_variant"] = None
    policy = _read_policy(request)
    if policy == "fixed" and "fixed_variant" not in changes:
        raise InvalidArgument("fixed_variant", "expected a variant for the policy fixed, got none")
    if policy != "fixed" and "fixed_variant" in changes:
        raise InvalidArgument(
            "fixed_variant", f"expected the policy fixed along with it, got {policy or 'none'}"
        )
    if policy is None:
        return changes
    return {"fixed_variant": None} | changes | {"policy": policy}


def _read_policy(request: pb.UpdateSchedulingRequest) -> str | None:
    """Return the policy that a request sets; None if it leaves the policy as it is."""
    if request.policy == pb.POLICY_NAME_UNSPECIFIED:
        return None
    if request.policy not in POLICY_BY_NUMBER:
        raise InvalidArgument(
            "policy", f"expected one of {', '.join(POLICY_NUMBERS)}, got {request.policy}"
        )
    return POLICY_BY_NUMBER[request.policy]


def _build_message(registry: ModelRegistry) -> pb.Scheduling:
    """Return the active settings, and the models that they do not fit."""
    active = registry.active_settings
    settings = active.settings
    fields = settings.model_dump(exclude={"policy", "fixed_variant"})
    return pb.Scheduling(
        policy=POLICY_NUMBERS[settings.policy],
        fixed_variant=settings.fixed_variant if settings.policy == "fixed" else None,
        revision=active.revision,
        unfit_models=registry.unfit_models,
        **fields,
    )

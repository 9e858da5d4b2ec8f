"""`ladderstitch.v1.InferenceService`: answers, and what a budget buys."""

from __future__ import annotations

import math
import time

from ladderstitch.api.deadlines import (
    LatencyBudget,
    arrival_and_deadline,
    call_deadlines,
    resolve_deadlines,
    seconds_from_us,
)
from ladderstitch.api.native.generation import describe_language_model
from ladderstitch.api.status import Context, statuses
from ladderstitch.api.validation import checked_id, checked_priority, checked_quality
from ladderstitch.errors import InvalidArgument, RequestError
from ladderstitch.hosting.registry import ModelRegistry, TextModel, VisionModel
from ladderstitch.scheduling.profiles import Quality
from ladderstitch.scheduling.requests import Completion, Logits, Pixels, Request
from ladderstitch.v1 import inference_pb2 as pb
from ladderstitch.v1 import inference_pb2_grpc

TOP = 5
DATATYPES = {pb.DATA_TYPE_UINT8: "UINT8", pb.DATA_TYPE_FP32: "FP32"}
SOURCES = {
    "grpc_deadline": pb.BUDGET_SOURCE_GRPC_DEADLINE,
    "latency_budget_us": pb.BUDGET_SOURCE_FIELD,
    "metadata": pb.BUDGET_SOURCE_METADATA,
    "model_default": pb.BUDGET_SOURCE_MODEL_DEFAULT,
}


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, registry: ModelRegistry) -> None:
        self.registry = registry

    @statuses
    async def Infer(self, request: pb.InferRequest, context: Context) -> pb.InferResponse:
        arrival, remaining_s = arrival_and_deadline(context)
        model = self.registry.vision_model(request.model_name, request.model_version)
        try:
            deadlines = call_deadlines(
                remaining_s,
                context.invocation_metadata(),
                model.bundle.manifest.default_budget_us,
            )
            accepted = await _accept(request, model, arrival, deadlines)
        except RequestError as error:
            model.scheduler.metrics.refused(error.code)
            raise
        completion = await model.scheduler.submit(accepted)
        return self._answer(request.request_id, model, accepted, completion)

    def _answer(
        self, request_id: str, model: VisionModel, request: Request, completion: Completion
    ) -> pb.InferResponse:
        table = model.bundle.quality
        assert table is not None, "a replica hosts only calibrated bundles"
        response = pb.InferResponse(
            model_name=model.name,
            model_version=model.version,
            request_id=request_id,
            predictions=predictions(completion.logits, model.bundle.manifest.labels),
            accounting=pb.Accounting(
                variant_id=completion.variant,
                variant_name=model.variants[completion.variant].name,
                quality=completion.quality,
                quality_metric=table.metric,
                quality_data=table.data,
                queue_us=round(1e6 * completion.queue_s),
                compute_us=round(1e6 * completion.compute_s),
                batch_size=completion.batch_size,
                replica=self.registry.replica,
            ),
        )
        accounting, now = response.accounting, time.monotonic()
        if request.deadlines.soft != math.inf:
            accounting.budget_us = round(1e6 * (request.deadlines.soft - request.arrival))
            accounting.budget_source = SOURCES[request.deadlines.soft_source]
            accounting.budget_met = now <= request.deadlines.soft
        accounting.total_us = round(1e6 * (now - request.arrival))
        return response

    @statuses
    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(
            models=[
                pb.ModelSummary(
                    name=model.name,
                    version=model.version,
                    ready=self.registry.serving,
                    variants=len(model.variants) if isinstance(model, VisionModel) else 1,
                    generates_text=isinstance(model, TextModel),
                )
                for model in self.registry.models_by_name.values()
            ]
        )

    @statuses
    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        hosted = self.registry.find(request.model_name, request.model_version)
        ready = self.registry.serving
        if isinstance(hosted, TextModel):
            return describe_language_model(hosted, ready)
        return _describe_image_model(hosted, ready)

    @statuses
    async def CheckBudget(
        self, request: pb.CheckBudgetRequest, context: Context
    ) -> pb.CheckBudgetResponse:
        model = self.registry.vision_model(request.model_name, request.model_version)
        given = request.HasField("latency_budget_us")
        seconds = seconds_from_us("latency_budget_us", request.latency_budget_us) if given else None
        check = model.scheduler.check_budget(seconds, checked_quality(request.min_quality))
        return pb.CheckBudgetResponse(
            now=_offer(model, check.now_variant),
            idle=_offer(model, check.idle_variant),
            smallest_budget_now_us=math.ceil(1e6 * check.smallest_now_s),
            smallest_budget_idle_us=math.ceil(1e6 * check.smallest_idle_s),
            waiting_us=round(1e6 * check.wait_s),
        )


async def _accept(
    request: pb.InferRequest,
    model: VisionModel,
    arrival: float,
    deadlines: list[LatencyBudget],
) -> Request:
    """The request as the scheduler takes it; raises `InvalidArgument` naming the field that is wrong."""
    if request.HasField("latency_budget_us"):
        seconds = seconds_from_us("latency_budget_us", request.latency_budget_us)
        deadlines.append(LatencyBudget(seconds, "latency_budget_us", request.hard_deadline))
    elif request.hard_deadline:
        raise InvalidArgument("hard_deadline", "expected latency_budget_us to be set along with it")
    return Request(
        id=checked_id("request_id", request.request_id),
        images=await _images(request, model),
        arrival=arrival,
        deadlines=resolve_deadlines(arrival, deadlines),
        min_quality=checked_quality(request.min_quality),
        variant=request.variant_id if request.HasField("variant_id") else None,
        priority=checked_priority(request.priority),
    )


async def _images(request: pb.InferRequest, model: VisionModel) -> Pixels:
    match request.WhichOneof("input"):
        case "tensor":
            tensor = request.tensor
            datatype = DATATYPES.get(tensor.data_type, str(tensor.data_type))
            return model.reader.tensor("tensor", datatype, tensor.shape, tensor.data)
        case "encoded_image":
            return await model.reader.encoded("encoded_image", request.encoded_image)
    raise InvalidArgument("input", "expected tensor or encoded_image to be set")


def predictions(logits: Logits, labels: tuple[str, ...]) -> list[pb.Prediction]:
    """One a row: all logits and the most probable classes.

    Python's own arithmetic: right after the model has run, NumPy's functions are in no cache, and
    take twice as long for ten classes.
    """
    best = (-logits).argsort(axis=1, kind="stable")[:, :TOP].tolist()
    return [
        pb.Prediction(top=_top(row, order, labels), logits=row)
        for row, order in zip(logits.tolist(), best, strict=True)
    ]


def _top(row: list[float], order: list[int], labels: tuple[str, ...]) -> list[pb.Classification]:
    """The classes named by `order`, the first of which is the likeliest."""
    most = row[order[0]]
    total = sum([math.exp(logit - most) for logit in row])
    return [
        pb.Classification(index=i, label=labels[i], probability=math.exp(row[i] - most) / total)
        for i in order
    ]


def _describe_image_model(model: VisionModel, ready: bool) -> pb.GetModelResponse:
    manifest, table = model.bundle.manifest, model.bundle.quality
    assert table is not None, "a replica hosts only calibrated bundles"
    inputs = manifest.preprocessing
    return pb.GetModelResponse(
        name=model.name,
        version=model.version,
        ready=ready,
        labels=manifest.labels,
        preprocessing=pb.Preprocessing(
            channels=inputs.channels,
            height=inputs.height,
            width=inputs.width,
            mean=inputs.mean,
            std=inputs.std,
        ),
        variants=[_variant(model, s, quality) for s, quality in sorted(table.variants.items())],
        frontier=model.scheduler.candidates.frontier,
        quality_metric=table.metric,
        quality_data=table.data,
        max_batch_size=model.scheduler.latency.view.max_batch_size,
        origin=manifest.origin,
        licence=manifest.licence,
    )


def _variant(model: VisionModel, variant: int, quality: Quality) -> pb.Variant:
    view, described = model.scheduler.latency.view, model.variants[variant]
    return pb.Variant(
        id=variant,
        name=described.name,
        is_anchor=described.is_anchor,
        quality=quality.value,
        quality_low=quality.low,
        quality_high=quality.high,
        latency_us=round(1e6 * view.expected(variant, 1)),
        planned_latency_us=round(1e6 * view.seconds(variant, 1)),
        on_frontier=variant in model.scheduler.candidates.frontier,
    )


def _offer(model: VisionModel, variant: int | None) -> pb.Offer | None:
    if variant is None:
        return None
    return pb.Offer(
        variant_id=variant,
        quality=model.scheduler.quality[variant],
        planned_latency_us=round(1e6 * model.scheduler.latency.view.seconds(variant, 1)),
    )

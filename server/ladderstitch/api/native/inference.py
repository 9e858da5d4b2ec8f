"""`ladderstitch.v1.InferenceService`: answers, and what a budget buys."""

from __future__ import annotations

import math
import time

from ladderstitch.api.deadlines import (
    Deadline,
    arrival_and_deadline,
    call_deadlines,
    resolve_budget,
    seconds_from_us,
)
from ladderstitch.api.native.generation import describe_language_model
from ladderstitch.api.status import Context, statuses
from ladderstitch.api.validation import checked_id, checked_priority, checked_quality
from ladderstitch.errors import BadInput, RequestError
from ladderstitch.hosting.registry import Host, HostedGenerator, HostedModel
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
    def __init__(self, host: Host) -> None:
        self.host = host

    @statuses
    async def Infer(self, request: pb.InferRequest, context: Context) -> pb.InferResponse:
        arrival, remaining_s = arrival_and_deadline(context)
        model = self.host.model(request.model_name, request.model_version)
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
        self, request_id: str, model: HostedModel, request: Request, completion: Completion
    ) -> pb.InferResponse:
        table = model.bundle.quality
        assert table is not None, "a replica hosts only calibrated bundles"
        response = pb.InferResponse(
            model_name=model.name,
            model_version=model.version,
            request_id=request_id,
            predictions=predictions(completion.logits, model.bundle.manifest.labels),
            accounting=pb.Accounting(
                stitch_id=completion.stitch,
                stitch_name=model.stitches[completion.stitch].name,
                quality=completion.quality,
                quality_metric=table.metric,
                quality_data=table.data,
                queue_us=round(1e6 * completion.queue_s),
                compute_us=round(1e6 * completion.compute_s),
                batch_size=completion.batch_rows,
                replica=self.host.replica,
            ),
        )
        accounting, now = response.accounting, time.monotonic()
        if request.budget.target != math.inf:
            accounting.budget_us = round(1e6 * (request.budget.target - request.arrival))
            accounting.budget_source = SOURCES[request.budget.target_source]
            accounting.budget_met = now <= request.budget.target
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
                    ready=self.host.serving,
                    stitches=len(model.stitches) if isinstance(model, HostedModel) else 1,
                    generates_text=isinstance(model, HostedGenerator),
                )
                for model in self.host.everything.values()
            ]
        )

    @statuses
    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        hosted = self.host.find(request.model_name, request.model_version)
        ready = self.host.serving
        if isinstance(hosted, HostedGenerator):
            return describe_language_model(hosted, ready)
        return _describe_image_model(hosted, ready)

    @statuses
    async def CheckBudget(
        self, request: pb.CheckBudgetRequest, context: Context
    ) -> pb.CheckBudgetResponse:
        model = self.host.model(request.model_name, request.model_version)
        given = request.HasField("latency_budget_us")
        seconds = seconds_from_us("latency_budget_us", request.latency_budget_us) if given else None
        check = model.scheduler.check_budget(seconds, checked_quality(request.min_quality))
        return pb.CheckBudgetResponse(
            now=_offer(model, check.now_stitch),
            idle=_offer(model, check.idle_stitch),
            smallest_budget_now_us=math.ceil(1e6 * check.smallest_now_s),
            smallest_budget_idle_us=math.ceil(1e6 * check.smallest_idle_s),
            waiting_us=round(1e6 * check.wait_s),
        )


async def _accept(
    request: pb.InferRequest,
    model: HostedModel,
    arrival: float,
    deadlines: list[Deadline],
) -> Request:
    """The request as the scheduler takes it; raises `BadInput` naming the field that is wrong."""
    if request.HasField("latency_budget_us"):
        seconds = seconds_from_us("latency_budget_us", request.latency_budget_us)
        deadlines.append(Deadline(seconds, "latency_budget_us", request.hard_deadline))
    elif request.hard_deadline:
        raise BadInput("hard_deadline", "expected latency_budget_us to be set along with it")
    return Request(
        id=checked_id("request_id", request.request_id),
        images=await _images(request, model),
        arrival=arrival,
        budget=resolve_budget(arrival, deadlines),
        min_quality=checked_quality(request.min_quality),
        stitch=request.stitch_id if request.HasField("stitch_id") else None,
        priority=checked_priority(request.priority),
    )


async def _images(request: pb.InferRequest, model: HostedModel) -> Pixels:
    match request.WhichOneof("input"):
        case "tensor":
            tensor = request.tensor
            datatype = DATATYPES.get(tensor.data_type, str(tensor.data_type))
            return model.reader.tensor("tensor", datatype, tensor.shape, tensor.data)
        case "encoded_image":
            return await model.reader.encoded("encoded_image", request.encoded_image)
    raise BadInput("input", "expected tensor or encoded_image to be set")


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


def _describe_image_model(model: HostedModel, ready: bool) -> pb.GetModelResponse:
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
        stitches=[_stitch(model, s, quality) for s, quality in sorted(table.stitches.items())],
        frontier=model.scheduler.menu.frontier,
        quality_metric=table.metric,
        quality_data=table.data,
        max_batch_size=model.scheduler.latency.view.max_rows,
        origin=manifest.origin,
        licence=manifest.licence,
    )


def _stitch(model: HostedModel, stitch: int, quality: Quality) -> pb.Stitch:
    view, described = model.scheduler.latency.view, model.stitches[stitch]
    return pb.Stitch(
        id=stitch,
        name=described.name,
        is_anchor=described.is_anchor,
        quality=quality.value,
        quality_low=quality.low,
        quality_high=quality.high,
        latency_us=round(1e6 * view.expected(stitch, 1)),
        planned_latency_us=round(1e6 * view.seconds(stitch, 1)),
        on_frontier=stitch in model.scheduler.menu.frontier,
    )


def _offer(model: HostedModel, stitch: int | None) -> pb.Offer | None:
    if stitch is None:
        return None
    return pb.Offer(
        stitch_id=stitch,
        quality=model.scheduler.quality[stitch],
        planned_latency_us=round(1e6 * model.scheduler.latency.view.seconds(stitch, 1)),
    )

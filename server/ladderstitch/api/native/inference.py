"""`ladderstitch.v1.InferenceService`: answers of image models, descriptions, budget checks."""

from __future__ import annotations

import math
import time

from ladderstitch.api.deadlines import (
    arrival_and_deadline,
    call_deadlines,
    message_budgets,
    resolve_deadlines,
    seconds_from_us,
)
from ladderstitch.api.native.generation import describe_text_model
from ladderstitch.api.native.vision_models import DATATYPES, build_output, describe_vision_model
from ladderstitch.api.status import Context, translate_errors
from ladderstitch.errors import InvalidArgument, RequestError
from ladderstitch.hosting.registry import LoadedModel, ModelRegistry, TextModel, VisionModel
from ladderstitch.scheduling.requests import (
    Certainty,
    ImageAnswer,
    Logits,
    Pixels,
    Request,
    check_confidence,
    check_id,
    check_priority,
    check_quality,
)
from ladderstitch.v1 import inference_pb2 as pb
from ladderstitch.v1 import inference_pb2_grpc
from ladderstitch.vision.networks.outputs import split_rows

NUM_TOP_CLASSES = 5
BUDGET_SOURCES = {
    "grpc_deadline": pb.BUDGET_SOURCE_GRPC_DEADLINE,
    "latency_budget_us": pb.BUDGET_SOURCE_FIELD,
    "metadata": pb.BUDGET_SOURCE_METADATA,
    "model_default": pb.BUDGET_SOURCE_MODEL_DEFAULT,
}


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """The servicer."""

    def __init__(self, registry: ModelRegistry) -> None:
        self.registry = registry

    @translate_errors
    async def Infer(self, request: pb.InferRequest, context: Context) -> pb.InferResponse:
        """Return the predictions for one request, and their accounting."""
        arrival, remaining_s = arrival_and_deadline(context)
        model = self.registry.vision_model(request.model_name, request.model_version)
        try:
            check_id("request_id", request.request_id)
            check_quality(request.min_quality)
            check_priority(request.priority)
            check_confidence(request.min_confidence)
            budget_us = request.latency_budget_us if request.HasField("latency_budget_us") else None
            default_us = model.bundle.manifest.default_budget_us
            budgets = call_deadlines(remaining_s, context.invocation_metadata(), default_us)
            budgets += message_budgets(budget_us, request.hard_deadline)
            images = await _read_images(request, model)
            model.limit.check_request("tensor", len(images), model.bundle.manifest.outputs)
            accepted = Request(
                id=request.request_id,
                images=images,
                arrival=arrival,
                deadlines=resolve_deadlines(arrival, budgets),
                min_quality=request.min_quality,
                variant=request.variant_id if request.HasField("variant_id") else None,
                priority=request.priority,
                min_confidence=request.min_confidence,
            )
        except RequestError as error:
            model.scheduler.metrics.observe_rejection(error.code)
            raise
        completion = await model.scheduler.submit(accepted)
        return _build_response(request, model, accepted, completion, self.registry.replica)

    @translate_errors
    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """Return a summary of each model, in order of their names."""
        models = self.registry.models_by_name.values()
        ready = self.registry.serving
        return pb.ListModelsResponse(models=[_summarise(model, ready) for model in models])

    @translate_errors
    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """Return the description of a model of either kind."""
        model = self.registry.find(request.model_name, request.model_version)
        if isinstance(model, TextModel):
            return describe_text_model(model, self.registry.serving)
        return describe_vision_model(model, self.registry.serving)

    @translate_errors
    async def CheckBudget(
        self, request: pb.CheckBudgetRequest, context: Context
    ) -> pb.CheckBudgetResponse:
        """Return the best variant within a budget, now and on an idle server."""
        model = self.registry.vision_model(request.model_name, request.model_version)
        has_budget = request.HasField("latency_budget_us")
        budget_s = (
            seconds_from_us("latency_budget_us", request.latency_budget_us) if has_budget else None
        )
        check_quality(request.min_quality)
        check = model.scheduler.check_budget(budget_s, request.min_quality)
        return pb.CheckBudgetResponse(
            now=_describe_offer(model, check.now_variant),
            idle=_describe_offer(model, check.idle_variant),
            smallest_budget_now_us=math.ceil(1e6 * check.smallest_now_s),
            smallest_budget_idle_us=math.ceil(1e6 * check.smallest_idle_s),
            waiting_us=round(1e6 * check.wait_s),
        )


async def _read_images(request: pb.InferRequest, model: VisionModel) -> Pixels:
    match request.WhichOneof("input"):
        case "tensor":
            tensor = request.tensor
            datatype = DATATYPES.get(tensor.data_type, str(tensor.data_type))
            return model.reader.read_tensor("tensor", datatype, tensor.shape, tensor.data)
        case "encoded_image":
            # The field is copied when it is read, which takes 1 ms per MB.
            model.reader.check_bytes("encoded_image", request.ByteSize())
            return await model.reader.read_encoded("encoded_image", request.encoded_image)
    raise InvalidArgument("input", "expected tensor or encoded_image to be set, got neither")


def _build_response(
    request: pb.InferRequest,
    model: VisionModel,
    accepted: Request,
    completion: ImageAnswer,
    replica: str,
) -> pb.InferResponse:
    table = model.bundle.quality
    assert table is not None, "a replica hosts only calibrated bundles"
    response = pb.InferResponse(
        model_name=model.name,
        model_version=model.version,
        request_id=request.request_id,
        accounting=pb.Accounting(
            variant_id=completion.variant,
            variant_name=model.variant_names[completion.variant],
            quality=completion.quality,
            quality_metric=table.metric,
            quality_data=table.data,
            queue_us=round(1e6 * completion.queue_s),
            compute_us=round(1e6 * completion.compute_s),
            batch_size=completion.batch_size,
            replica=replica,
        ),
    )
    manifest = model.bundle.manifest
    if manifest.outputs:
        for name, values in split_rows(completion.logits, manifest.outputs).items():
            response.outputs.append(build_output(name, values))
    else:
        response.predictions.extend(build_predictions(completion.logits, manifest.labels))
    if completion.certainty is not None:
        _add_certainty(response, completion.certainty)
    accounting, now = response.accounting, time.monotonic()
    deadlines = accepted.deadlines
    if deadlines.soft != math.inf:
        accounting.budget_us = round(1e6 * (deadlines.soft - accepted.arrival))
        accounting.budget_source = BUDGET_SOURCES[deadlines.soft_source]
        accounting.budget_met = now <= deadlines.soft
    accounting.total_us = round(1e6 * (now - accepted.arrival))
    return response


def _add_certainty(response: pb.InferResponse, certainty: Certainty) -> None:
    """State which variants ran and how sure the answer is, also for each image."""
    response.accounting.stages.extend(certainty.stages)
    response.accounting.confidence = min(certainty.confidence)
    for prediction, confidence, variant in zip(
        response.predictions, certainty.confidence, certainty.variants, strict=True
    ):
        prediction.confidence, prediction.variant_id = confidence, variant


def build_predictions(logits: Logits, labels: tuple[str, ...]) -> list[pb.Prediction]:
    """Return one prediction per row of logits [B, classes]: all logits and the best classes.

    The arithmetic is Python's own: right after the model has run, NumPy's functions are in no
    cache and take twice as long for ten classes.
    """
    best = (-logits).argsort(axis=1, kind="stable")[:, :NUM_TOP_CLASSES].tolist()
    return [
        pb.Prediction(top=_classify(row, order, labels), logits=row)
        for row, order in zip(logits.tolist(), best, strict=True)
    ]


def _classify(
    row: list[float], order: list[int], labels: tuple[str, ...]
) -> list[pb.Classification]:
    """Return the classes with the indices in `order`, of which the first is the most probable."""
    largest = row[order[0]]
    total = sum([math.exp(logit - largest) for logit in row])
    return [
        pb.Classification(index=i, label=labels[i], probability=math.exp(row[i] - largest) / total)
        for i in order
    ]


def _summarise(model: LoadedModel, ready: bool) -> pb.ModelSummary:
    variants = model.bundle.manifest.variants if isinstance(model, TextModel) else model.variants
    return pb.ModelSummary(
        name=model.name,
        version=model.version,
        ready=ready,
        variants=len(variants),
        generates_text=isinstance(model, TextModel),
    )


def _describe_offer(model: VisionModel, variant: int | None) -> pb.Offer | None:
    if variant is None:
        return None
    planner = model.scheduler.planner
    return pb.Offer(
        variant_id=variant,
        quality=planner.quality[variant],
        planned_latency_us=round(1e6 * planner.latency.view.seconds(variant, 1)),
    )

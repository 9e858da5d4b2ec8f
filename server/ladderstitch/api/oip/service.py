"""The Open Inference Protocol, version 2: existing clients work unmodified.

One input, `images`: FP32 (preprocessed) or UINT8 (pixels) of [N, C, H, W], or BYTES of [N] (PNG or
JPEG files). Outputs: `logits`, and on demand `probabilities` and `labels`.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import numpy as np

import ladderstitch
from ladderstitch.api.deadlines import arrival_and_deadline, call_deadlines, resolve_deadlines
from ladderstitch.api.oip import metadata, text
from ladderstitch.api.oip.inputs import RequestOptions, read_images, read_parameters, softmax
from ladderstitch.api.oip.text import answer_stream
from ladderstitch.api.status import Context, statuses
from ladderstitch.api.validation import checked_id
from ladderstitch.errors import InvalidArgument, PermissionDenied, RequestError
from ladderstitch.hosting.registry import AdminActions, ModelRegistry, TextModel, VisionModel
from ladderstitch.hosting.streaming import answer
from ladderstitch.oip import grpc_service_pb2 as pb
from ladderstitch.oip import grpc_service_pb2_grpc
from ladderstitch.scheduling.requests import Completion, Pixels, Request

OUTPUTS = ("logits", "probabilities", "labels")


class OipService(grpc_service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, registry: ModelRegistry, repository: AdminActions | None = None) -> None:
        """`repository` loads and unloads models; None where only the admin port may."""
        self.registry = registry
        self.repository = repository

    @property
    def _serving(self) -> bool:
        return self.registry.serving

    @statuses
    async def ServerLive(
        self, request: pb.ServerLiveRequest, context: Context
    ) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    @statuses
    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: Context
    ) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._serving)

    @statuses
    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: Context
    ) -> pb.ModelReadyResponse:
        ready = self._serving and bool(self.registry.find(request.name, request.version))
        return pb.ModelReadyResponse(ready=ready)

    @statuses
    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(
            name="ladderstitch",
            version=ladderstitch.__version__,
            extensions=["model_configuration", "model_repository", "statistics"],
        )

    @statuses
    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        model = self.registry.find(request.name, request.version)
        if isinstance(model, TextModel):
            return text.metadata(model)
        return metadata.metadata(model)

    @statuses
    async def ModelConfig(
        self, request: pb.ModelConfigRequest, context: Context
    ) -> pb.ModelConfigResponse:
        model = self.registry.find(request.name, request.version)
        if isinstance(model, TextModel):
            return pb.ModelConfigResponse(config=text.config(model))
        return pb.ModelConfigResponse(config=metadata.config(model))

    @statuses
    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse:
        named = (
            [self.registry.vision_model(request.name, request.version)] if request.name else None
        )
        models = named if named is not None else list(self.registry.vision_models.values())
        return pb.ModelStatisticsResponse(model_stats=[metadata.statistics(m) for m in models])

    @statuses
    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, context: Context
    ) -> pb.RepositoryIndexResponse:
        state = "READY" if self._serving else "UNAVAILABLE"
        models = self.registry.models_by_name.values() if self._serving or not request.ready else ()
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(name=m.name, version=m.version, state=state)
                for m in models
            ]
        )

    @statuses
    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        if request.parameters:
            raise InvalidArgument(
                "parameters", f"expected none, got {sorted(request.parameters)[:3]}"
            )
        await self._control().load(request.model_name)
        return pb.RepositoryModelLoadResponse()

    @statuses
    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        await self._control().unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    def _control(self) -> AdminActions:
        if self.repository is None:
            raise PermissionDenied("models are loaded and unloaded at the admin port: AdminService")
        return self.repository

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncGenerator[pb.ModelStreamInferResponse]:
        async def respond(request: pb.ModelInferRequest) -> AsyncGenerator[pb.ModelInferResponse]:
            model = self.registry.find(request.model_name, request.model_version)
            if isinstance(model, VisionModel):
                yield await self._infer(request, context)
                return
            try:
                accepted = text.accept(
                    request,
                    model,
                    time.monotonic(),
                    context.time_remaining(),
                    context.invocation_metadata(),
                )
            except RequestError as error:
                model.metrics.refused(error.code, had_budget=False)
                raise
            async with aclosing(answer(model, accepted)) as pieces:
                async for piece, account in pieces:
                    yield text.response(request, model, piece, account, self.registry.replica)

        async with aclosing(answer_stream(request_iterator, respond)) as responses:
            async for response in responses:
                yield response

    @statuses
    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        return await self._infer(request, context)

    async def _infer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        arrival, remaining_s = arrival_and_deadline(context)
        model = self.registry.vision_model(request.model_name, request.model_version)
        try:
            wanted = _wanted_outputs(request)
            wishes = RequestOptions(
                call_deadlines(
                    remaining_s,
                    context.invocation_metadata(),
                    model.bundle.manifest.default_budget_us,
                )
            )
            read_parameters(request, wishes)
            images = await read_images(
                request, model.reader, model.scheduler.latency.view.max_batch_size
            )
            accepted = _accept(request, wishes, images, arrival)
        except RequestError as error:
            model.scheduler.metrics.refused(error.code)
            raise
        completion = await model.scheduler.submit(accepted)
        return self._answer(request, model, accepted, completion, wanted)

    def _answer(
        self,
        request: pb.ModelInferRequest,
        model: VisionModel,
        accepted: Request,
        completion: Completion,
        wanted: tuple[str, ...],
    ) -> pb.ModelInferResponse:
        response = pb.ModelInferResponse(
            model_name=model.name, model_version=model.version, id=request.id
        )
        for name in wanted:
            _add_output(response, name, completion, model.bundle.manifest.labels)
        now, parameters = time.monotonic(), response.parameters
        for key, value in (
            ("variant_id", completion.variant),
            ("queue_us", round(1e6 * completion.queue_s)),
            ("compute_us", round(1e6 * completion.compute_s)),
            ("total_us", round(1e6 * (now - accepted.arrival))),
            ("batch_size", completion.batch_size),
        ):
            parameters[f"ladderstitch_{key}"].int64_param = value
        name = model.variants[completion.variant].name
        parameters["ladderstitch_variant_name"].string_param = name
        parameters["ladderstitch_quality"].double_param = completion.quality
        parameters["ladderstitch_replica"].string_param = self.registry.replica
        target = accepted.deadlines.soft
        if target != math.inf:
            budget_us = round(1e6 * (target - accepted.arrival))
            parameters["ladderstitch_budget_us"].int64_param = budget_us
            parameters["ladderstitch_budget_source"].string_param = accepted.deadlines.soft_source
            parameters["ladderstitch_budget_met"].bool_param = now <= target
        return response


def _wanted_outputs(request: pb.ModelInferRequest) -> tuple[str, ...]:
    names = tuple(output.name for output in request.outputs) or ("logits",)
    for name in names:
        if name not in OUTPUTS:
            raise InvalidArgument("outputs", f"expected some of {list(OUTPUTS)}, got {name[:80]!r}")
    return names


def _accept(
    request: pb.ModelInferRequest, wishes: RequestOptions, images: Pixels, arrival: float
) -> Request:
    return Request(
        id=checked_id("id", request.id),
        images=images,
        arrival=arrival,
        deadlines=resolve_deadlines(arrival, wishes.deadlines),
        min_quality=wishes.min_quality,
        variant=wishes.variant,
        priority=wishes.priority,
    )


def _add_output(
    response: pb.ModelInferResponse, name: str, completion: Completion, labels: tuple[str, ...]
) -> None:
    if name == "labels":
        best = [labels[i].encode() for i in completion.logits.argmax(axis=1)]
        raw = b"".join(len(label).to_bytes(4, "little") + label for label in best)
        response.outputs.add(name=name, datatype="BYTES", shape=[len(best)])
    else:
        values = completion.logits if name == "logits" else softmax(completion.logits)
        raw = np.ascontiguousarray(values, "<f4").tobytes()
        response.outputs.add(name=name, datatype="FP32", shape=values.shape)
    response.raw_output_contents.append(raw)

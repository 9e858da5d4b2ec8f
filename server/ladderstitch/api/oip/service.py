"""The service of the Open Inference Protocol, version 2, which existing clients call unmodified."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import grpc

import ladderstitch
from ladderstitch.api.deadlines import arrival_and_deadline, call_deadlines
from ladderstitch.api.oip import image_models, images, text
from ladderstitch.api.oip.extensions import TritonExtensions
from ladderstitch.api.oip.options import check_parameters
from ladderstitch.api.oip.statistics import describe_statistics
from ladderstitch.api.oip.streams import Item, answer_stream, parse_item
from ladderstitch.api.status import Context, abort, as_request_error, translate_errors
from ladderstitch.errors import (
    InvalidArgument,
    ModelNotFound,
    NotReady,
    PermissionDenied,
    RequestError,
)
from ladderstitch.hosting.registry import AdminActions, ModelRegistry, TextModel, VisionModel
from ladderstitch.oip import grpc_service_pb2 as pb
from ladderstitch.oip import grpc_service_pb2_grpc

EXTENSIONS = (
    "classification",
    "logging",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "statistics",
    "trace",
)


class OipService(TritonExtensions):
    """The servicer; `images` and `text` handle the two kinds of models."""

    def __init__(self, registry: ModelRegistry, actions: AdminActions | None = None) -> None:
        """Serve the models of `registry`; without `actions`, only the admin port loads models."""
        self.registry = registry
        self.actions = actions

    @translate_errors
    async def ServerLive(
        self, request: pb.ServerLiveRequest, context: Context
    ) -> pb.ServerLiveResponse:
        """Return that the server is live."""
        return pb.ServerLiveResponse(live=True)

    @translate_errors
    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: Context
    ) -> pb.ServerReadyResponse:
        """Return whether the replica accepts requests."""
        return pb.ServerReadyResponse(ready=self.registry.serving)

    @translate_errors
    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: Context
    ) -> pb.ModelReadyResponse:
        """Return whether the replica accepts requests for a model; false for any unknown one."""
        try:
            self.registry.find(request.name, request.version)
        except (ModelNotFound, NotReady):
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self.registry.serving)

    @translate_errors
    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        """Return the server's name, version and extensions of the protocol."""
        return pb.ServerMetadataResponse(
            name="ladderstitch", version=ladderstitch.__version__, extensions=EXTENSIONS
        )

    @translate_errors
    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        """Return the names, types and shapes of a model's inputs and outputs."""
        model = self.registry.find(request.name, request.version)
        if isinstance(model, TextModel):
            return text.describe_metadata(model)
        return image_models.describe_metadata(model)

    @translate_errors
    async def ModelConfig(
        self, request: pb.ModelConfigRequest, context: Context
    ) -> pb.ModelConfigResponse:
        """Return the configuration of a model."""
        model = self.registry.find(request.name, request.version)
        if isinstance(model, TextModel):
            return pb.ModelConfigResponse(config=text.describe_config(model))
        return pb.ModelConfigResponse(config=image_models.describe_config(model))

    @translate_errors
    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse:
        """Return the statistics of a model of either kind; without a name, of all of them."""
        if request.name:
            models = [self.registry.find(request.name, request.version)]
        else:
            models = list(self.registry.models_by_name.values())
        statistics = [describe_statistics(model) for model in models]
        return pb.ModelStatisticsResponse(model_stats=statistics)

    @translate_errors
    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, context: Context
    ) -> pb.RepositoryIndexResponse:
        """Return all models with their state; if `ready` is set, only those that are ready."""
        _check_repository(request.repository_name)
        serving = self.registry.serving
        state = "READY" if serving else "UNAVAILABLE"
        models = self.registry.models_by_name.values() if serving or not request.ready else ()
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(name=m.name, version=m.version, state=state)
                for m in models
            ]
        )

    @translate_errors
    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        """Load a model, or a new version of a loaded one; returns when it is warm."""
        _check_repository(request.repository_name)
        check_parameters("load", request.parameters)
        await self._admin_actions().load(request.model_name)
        return pb.RepositoryModelLoadResponse()

    @translate_errors
    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        """Unload a model; returns when its accepted requests have ended."""
        _check_repository(request.repository_name)
        check_parameters("unload", request.parameters)
        await self._admin_actions().unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    def _admin_actions(self) -> AdminActions:
        if self.actions is None:
            raise PermissionDenied("only AdminService on the admin port loads and unloads models")
        return self.actions

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[Item], context: Context
    ) -> AsyncGenerator[pb.ModelStreamInferResponse]:
        """Answer any number of requests for models of both kinds on one stream."""

        async def respond(request: pb.ModelInferRequest) -> AsyncGenerator[pb.ModelInferResponse]:
            model = self.registry.find(request.model_name, request.model_version)
            if isinstance(model, VisionModel):
                answer = await self._infer(request, context)
                answer.parameters["triton_final_response"].bool_param = True
                yield answer
                return
            async with aclosing(self._generate(request, model, context)) as responses:
                async for response in responses:
                    yield response

        try:
            async with aclosing(answer_stream(request_iterator, respond)) as responses:
                async for response in responses:
                    yield response
        except BaseException as error:
            await abort(context, as_request_error("ModelStreamInfer", error))

    @translate_errors
    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        """Classify the images of one request."""
        return await self._infer(request, context)

    async def _infer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        arrival, remaining_s = arrival_and_deadline(context)
        name, version = request.model_name, request.model_version
        model = self.registry.vision_model(name, version, instead="ModelStreamInfer")
        try:
            outputs = images.read_outputs(request, model)
            default_us = model.bundle.manifest.default_budget_us
            budgets = call_deadlines(remaining_s, context.invocation_metadata(), default_us)
            accepted = await images.build_request(request, model, arrival, budgets, outputs)
        except RequestError as error:
            model.scheduler.metrics.observe_rejection(error.code)
            raise
        completion = await model.scheduler.submit(accepted)
        return images.build_response(model, accepted, completion, outputs, self.registry.replica)

    async def _generate(
        self, request: pb.ModelInferRequest, model: TextModel, context: Context
    ) -> AsyncGenerator[pb.ModelInferResponse]:
        remaining_s, metadata = context.time_remaining(), context.invocation_metadata()
        try:
            outputs = text.read_outputs(request)
            accepted = text.build_generation_request(
                request, model, time.monotonic(), remaining_s, metadata
            )
        except RequestError as error:
            model.metrics.observe_rejection(error.code, had_budget=False)
            raise
        async with aclosing(model.scheduler.generate(accepted)) as chunks:
            async for chunk in chunks:
                yield text.build_response(request, model, chunk, outputs, self.registry.replica)


def add_oip_service(service: OipService, server: grpc.aio.Server) -> None:
    """Add the service to a server, so that malformed messages do not end a stream.

    gRPC asks handlers in the order in which they were added.
    """
    stream = grpc.stream_stream_rpc_method_handler(
        service.ModelStreamInfer,
        request_deserializer=parse_item,
        response_serializer=pb.ModelStreamInferResponse.SerializeToString,
    )
    handlers = {"ModelStreamInfer": stream}
    name = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)


def _check_repository(name: str) -> None:
    if name:
        raise InvalidArgument("repository_name", f"expected none, got {name[:80]!r}")

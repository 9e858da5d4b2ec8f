"""The blocking client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ladderstitch.client.channel import PLAIN, RETRY_POLICY, Credentials, retry_options
from ladderstitch.client.errors import RequestFailed
from ladderstitch.client.messages import (
    Image,
    Prediction,
    TextChunk,
    check_budget_request,
    generate_request,
    infer_request,
)
from ladderstitch.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    generation_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)


class Client:
    """Blocking; one channel, safe to share between threads. Raises `RequestFailed`."""

    def __init__(
        self,
        address: str = "127.0.0.1:8001",
        timeout_s: float = 30.0,
        access: Credentials = PLAIN,
        retries: str | None = RETRY_POLICY,
    ) -> None:
        """`retries` is a gRPC service config; None: what fails, fails at once.

        Raises `ValueError` and `OSError` as `Credentials.credentials` does.
        """
        self.timeout_s = timeout_s
        self._metadata = access.metadata
        credentials = access.credentials(address)
        options = [*retry_options(retries), *access.options]
        self.channel = (
            grpc.insecure_channel(address, options=options)
            if credentials is None
            else grpc.secure_channel(address, credentials, options=options)
        )
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(self.channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self.channel.close()

    def predict(self, image: Image, *, timeout_s: float | None = None, **wishes: Any) -> Prediction:
        """Classify; `wishes` are those of `infer_request`, `timeout_s` is the gRPC deadline."""
        request = infer_request(image, **wishes)
        return Prediction.of(self._call(self.inference.Infer, request, timeout_s))

    def generate(
        self, prompt: str | Sequence[int], *, timeout_s: float | None = None, **wishes: Any
    ) -> Iterator[TextChunk]:
        """The answer's pieces as they come; `wishes` are those of `generate_request`."""
        request = generate_request(prompt, **wishes)
        try:
            for response in self.generation.Generate(
                request, timeout=timeout_s or self.timeout_s, metadata=self._metadata
            ):
                yield TextChunk.of(response)
        except grpc.RpcError as error:
            raise RequestFailed(error) from None

    def list_models(self) -> inference_pb2.ListModelsResponse:
        reply: inference_pb2.ListModelsResponse = self._call(
            self.inference.ListModels, inference_pb2.ListModelsRequest()
        )
        return reply

    def get_model(self, model: str = "") -> inference_pb2.GetModelResponse:
        reply: inference_pb2.GetModelResponse = self._call(
            self.inference.GetModel, inference_pb2.GetModelRequest(model_name=model)
        )
        return reply

    def check_budget(
        self, budget_s: float | None = None, min_quality: float | None = None, model: str = ""
    ) -> inference_pb2.CheckBudgetResponse:
        request = check_budget_request(budget_s, min_quality, model)
        reply: inference_pb2.CheckBudgetResponse = self._call(self.inference.CheckBudget, request)
        return reply

    def get_scheduling(self, model: str = "") -> admin_pb2.Scheduling:
        request = admin_pb2.GetSchedulingRequest(model_name=model)
        scheduling: admin_pb2.Scheduling = self._call(self.admin.GetScheduling, request).scheduling
        return scheduling

    def update_scheduling(self, **changes: Any) -> admin_pb2.Scheduling:
        """Fields of `UpdateSchedulingRequest`, e.g. `pinned_variant=3`."""
        request = admin_pb2.UpdateSchedulingRequest(**changes)
        reply: admin_pb2.UpdateSchedulingResponse = self._call(self.admin.UpdateScheduling, request)
        return reply.scheduling

    def load_model(self, bundle: str, *, timeout_s: float = 600.0) -> str:
        """Serve a fetched model on this replica, too; the name under which it answers."""
        request = admin_pb2.LoadModelRequest(bundle=bundle)
        reply: admin_pb2.LoadModelResponse = self._call(self.admin.LoadModel, request, timeout_s)
        return reply.model_name

    def unload_model(self, model: str, *, timeout_s: float | None = None) -> None:
        """Take a model away from this replica when its accepted requests have ended."""
        request = admin_pb2.UnloadModelRequest(model_name=model)
        self._call(self.admin.UnloadModel, request, timeout_s)

    def drain(self, announce_s: float = 0.0, *, timeout_s: float | None = None) -> bool:
        """Take the replica out of service; waits, and tells whether all its requests ended."""
        request = admin_pb2.DrainRequest()
        request.announce.FromTimedelta(timedelta(seconds=announce_s))
        reply: admin_pb2.DrainResponse = self._call(self.admin.Drain, request, timeout_s)
        return reply.finished

    def health(self, service: str = "") -> str:
        """State of a service, a model or all: SERVING, NOT_SERVING."""
        request = health_pb2.HealthCheckRequest(service=service)
        reply = self._call(health_pb2_grpc.HealthStub(self.channel).Check, request)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))

    def _call(self, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        try:
            return method(request, timeout=timeout_s or self.timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise RequestFailed(error) from None

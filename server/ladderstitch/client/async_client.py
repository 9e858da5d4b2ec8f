"""The client for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import grpc

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


class AsyncClient:
    """As `Client`, for asyncio; many calls may be in flight on one channel."""

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
            grpc.aio.insecure_channel(address, options=options)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options=options)
        )
        self.inference: Any = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.generation: Any = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.admin: Any = admin_pb2_grpc.AdminServiceStub(self.channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self.channel.close()

    async def predict(
        self, image: Image, *, timeout_s: float | None = None, **wishes: Any
    ) -> Prediction:
        """Classify; `wishes` are those of `infer_request`, `timeout_s` is the gRPC deadline."""
        request = infer_request(image, **wishes)
        return Prediction.of(await self._call(self.inference.Infer, request, timeout_s))

    async def generate(
        self, prompt: str | Sequence[int], *, timeout_s: float | None = None, **wishes: Any
    ) -> AsyncIterator[TextChunk]:
        """The answer's pieces as they come; `wishes` are those of `generate_request`."""
        request = generate_request(prompt, **wishes)
        call = self.generation.Generate(
            request, timeout=timeout_s or self.timeout_s, metadata=self._metadata
        )
        try:
            async for response in call:
                yield TextChunk.of(response)
        except grpc.RpcError as error:
            raise RequestFailed(error) from None
        finally:
            call.cancel()

    async def list_models(self) -> inference_pb2.ListModelsResponse:
        reply: inference_pb2.ListModelsResponse = await self._call(
            self.inference.ListModels, inference_pb2.ListModelsRequest()
        )
        return reply

    async def get_model(self, model: str = "") -> inference_pb2.GetModelResponse:
        reply: inference_pb2.GetModelResponse = await self._call(
            self.inference.GetModel, inference_pb2.GetModelRequest(model_name=model)
        )
        return reply

    async def check_budget(
        self, budget_s: float | None = None, min_quality: float | None = None, model: str = ""
    ) -> inference_pb2.CheckBudgetResponse:
        request = check_budget_request(budget_s, min_quality, model)
        reply: inference_pb2.CheckBudgetResponse = await self._call(
            self.inference.CheckBudget, request
        )
        return reply

    async def update_scheduling(self, **changes: Any) -> admin_pb2.Scheduling:
        """Fields of `UpdateSchedulingRequest`, e.g. `pinned_variant=3`."""
        request = admin_pb2.UpdateSchedulingRequest(**changes)
        reply: admin_pb2.UpdateSchedulingResponse = await self._call(
            self.admin.UpdateScheduling, request
        )
        return reply.scheduling

    async def load_model(self, bundle: str, *, timeout_s: float = 600.0) -> str:
        """Serve a fetched model on this replica, too; the name under which it answers."""
        request = admin_pb2.LoadModelRequest(bundle=bundle)
        reply: admin_pb2.LoadModelResponse = await self._call(
            self.admin.LoadModel, request, timeout_s
        )
        return reply.model_name

    async def unload_model(self, model: str, *, timeout_s: float | None = None) -> None:
        """Take a model away from this replica when its accepted requests have ended."""
        request = admin_pb2.UnloadModelRequest(model_name=model)
        await self._call(self.admin.UnloadModel, request, timeout_s)

    async def drain(self, announce_s: float = 0.0, *, timeout_s: float | None = None) -> bool:
        """Take the replica out of service; waits, and tells whether all its requests ended."""
        request = admin_pb2.DrainRequest()
        request.announce.FromTimedelta(timedelta(seconds=announce_s))
        reply: admin_pb2.DrainResponse = await self._call(self.admin.Drain, request, timeout_s)
        return reply.finished

    async def _call(self, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        try:
            return await method(
                request, timeout=timeout_s or self.timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise RequestFailed(error) from None

"""A small typed client of `ladderstitch.v1`, blocking and asynchronous.

with Client("127.0.0.1:8001") as client:
    prediction = client.predict(png_bytes, budget_s=0.005)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from numpy.typing import NDArray

from ladderstitch.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

DETAILS_KEY = "grpc-status-details-bin"
Image = bytes | NDArray[np.uint8] | NDArray[np.float32]
"""A PNG or JPEG file, or [N, C, H, W]: uint8 pixels or preprocessed float32."""


class RequestFailed(Exception):
    """A call ended with a status; `reason` is machine-readable, e.g. `BUDGET_INFEASIBLE`."""

    def __init__(self, error: grpc.RpcError) -> None:
        self.code: grpc.StatusCode = error.code()
        self.message: str = error.details() or ""
        self.reason = ""
        self.metadata: dict[str, str] = {}
        self.violations: dict[str, str] = {}
        self.retry_after_s: float | None = None
        for key, value in error.trailing_metadata() or ():
            if key == DETAILS_KEY:
                self._read(Status.FromString(value))
        super().__init__(f"{self.code.name}: {self.message}")

    def _read(self, status: Status) -> None:
        info, bad, retry = ErrorInfo(), BadRequest(), RetryInfo()
        for detail in status.details:
            if detail.Unpack(info):
                self.reason, self.metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(bad):
                self.violations = {v.field: v.description for v in bad.field_violations}
            elif detail.Unpack(retry):
                self.retry_after_s = retry.retry_delay.ToMicroseconds() / 1e6


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one call, for its first image; `all` holds every image's classes."""

    label: str
    probability: float
    stitch: int
    stitch_name: str
    quality: float
    quality_metric: str
    queue_s: float
    compute_s: float
    total_s: float
    budget_s: float | None
    budget_met: bool | None
    batch_size: int
    all: list[list[tuple[str, float]]] = field(repr=False)
    logits: NDArray[np.float32] = field(repr=False)

    @classmethod
    def of(cls, response: inference_pb2.InferResponse) -> Prediction:
        cost = response.accounting
        classes = [[(c.label, c.probability) for c in p.top] for p in response.predictions]
        label, probability = classes[0][0]
        return cls(
            label=label,
            probability=probability,
            stitch=cost.stitch_id,
            stitch_name=cost.stitch_name,
            quality=cost.quality,
            quality_metric=cost.quality_metric,
            queue_s=cost.queue_us / 1e6,
            compute_s=cost.compute_us / 1e6,
            total_s=cost.total_us / 1e6,
            budget_s=cost.budget_us / 1e6 if cost.HasField("budget_us") else None,
            budget_met=cost.budget_met if cost.HasField("budget_met") else None,
            batch_size=cost.batch_size,
            all=classes,
            logits=np.array([p.logits for p in response.predictions], np.float32),
        )


def infer_request(
    image: Image,
    *,
    model: str = "",
    budget_s: float | None = None,
    hard: bool = False,
    min_quality: float | None = None,
    stitch: int | None = None,
    priority: int = 0,
) -> inference_pb2.InferRequest:
    """The message of a `predict` call; raises `TypeError` for an array of another type."""
    request = inference_pb2.InferRequest(
        model_name=model,
        hard_deadline=hard,
        min_quality=min_quality,
        stitch_id=stitch,
        priority=priority,
    )
    if budget_s is not None:
        request.latency_budget_us = round(1e6 * budget_s)
    if isinstance(image, bytes):
        request.encoded_image = image
        return request
    kinds = {
        np.dtype(np.uint8): inference_pb2.DATA_TYPE_UINT8,
        np.dtype(np.float32): inference_pb2.DATA_TYPE_FP32,
    }
    if image.dtype not in kinds:
        raise TypeError(f"image: expected uint8 or float32, got {image.dtype}")
    request.tensor.data_type = kinds[image.dtype]
    request.tensor.shape.extend(image.shape)
    request.tensor.data = np.ascontiguousarray(image).tobytes()
    return request


class Client:
    """Blocking; one channel, safe to share between threads. Raises `RequestFailed`."""

    def __init__(self, address: str = "127.0.0.1:8001", timeout_s: float = 30.0) -> None:
        self.timeout_s = timeout_s
        self.channel = grpc.insecure_channel(address)
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
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
        """Fields of `UpdateSchedulingRequest`, e.g. `pinned_stitch=3`."""
        request = admin_pb2.UpdateSchedulingRequest(**changes)
        reply: admin_pb2.UpdateSchedulingResponse = self._call(self.admin.UpdateScheduling, request)
        return reply.scheduling

    def _call(self, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        try:
            return method(request, timeout=timeout_s or self.timeout_s)
        except grpc.RpcError as error:
            raise RequestFailed(error) from None


class AsyncClient:
    """The same for asyncio; many calls may be in flight on one channel."""

    def __init__(self, address: str = "127.0.0.1:8001", timeout_s: float = 30.0) -> None:
        self.timeout_s = timeout_s
        self.channel = grpc.aio.insecure_channel(address)
        self.inference: Any = inference_pb2_grpc.InferenceServiceStub(self.channel)
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
        """Fields of `UpdateSchedulingRequest`, e.g. `pinned_stitch=3`."""
        request = admin_pb2.UpdateSchedulingRequest(**changes)
        reply: admin_pb2.UpdateSchedulingResponse = await self._call(
            self.admin.UpdateScheduling, request
        )
        return reply.scheduling

    async def _call(self, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        try:
            return await method(request, timeout=timeout_s or self.timeout_s)
        except grpc.RpcError as error:
            raise RequestFailed(error) from None


def check_budget_request(
    budget_s: float | None, min_quality: float | None, model: str
) -> inference_pb2.CheckBudgetRequest:
    return inference_pb2.CheckBudgetRequest(
        model_name=model,
        latency_budget_us=None if budget_s is None else round(1e6 * budget_s),
        min_quality=min_quality,
    )

"""Requests as messages, their answers, and the error of a failed call."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias, TypedDict

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from ladderstitch.client.tensors import read_logits, read_output
from ladderstitch.v1 import inference_pb2

if TYPE_CHECKING:
    import numpy as np  # only arrays need it
    from numpy.typing import NDArray

DETAILS_KEY = "grpc-status-details-bin"
"""Trailing metadata that holds a `google.rpc.Status`."""

Image: TypeAlias = "bytes | NDArray[np.uint8] | NDArray[np.float32]"
"""A PNG or JPEG file, or an array [B, C, H, W]: uint8 pixels or preprocessed float32.

Models that do not take images have float32 inputs [B, ...].
"""

DATA_TYPES = {
    "uint8": inference_pb2.DATA_TYPE_UINT8,
    "float32": inference_pb2.DATA_TYPE_FP32,
}
"""The types of input arrays, by the names of numpy."""

BUDGET_SOURCES: dict[int, str] = {
    value: name.removeprefix("BUDGET_SOURCE_").lower()
    for name, value in inference_pb2.BudgetSource.items()
    if value != inference_pb2.BUDGET_SOURCE_UNSPECIFIED
}


class RequestFailed(Exception):
    """A call that ended with an error status; `code` is the gRPC status.

    `reason` is machine-readable, e.g. `BUDGET_INFEASIBLE`, and empty if the error does not come
    from the server. `violations` describes each invalid field by its name. `retry_after_s` is None
    unless the server names a time to wait before a retry.
    """

    def __init__(self, error: grpc.RpcError) -> None:
        self.code: grpc.StatusCode = error.code()
        self.message: str = error.details() or ""
        self.reason = ""
        self.metadata: dict[str, str] = {}
        self.violations: dict[str, str] = {}
        self.retry_after_s: float | None = None
        for key, value in error.trailing_metadata() or ():
            if key == DETAILS_KEY:
                self._read_details(Status.FromString(value))
        code = self.code.name
        super().__init__(self.message if self.reason == code else f"{code}: {self.message}")

    def _read_details(self, status: Status) -> None:
        info, bad_request, retry = ErrorInfo(), BadRequest(), RetryInfo()
        for detail in status.details:
            if detail.Unpack(info):
                self.reason, self.metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(bad_request):
                self.violations = {v.field: v.description for v in bad_request.field_violations}
            elif detail.Unpack(retry):
                self.retry_after_s = retry.retry_delay.ToMicroseconds() / 1e6


class InferOptions(TypedDict, total=False):
    """The options of `predict`: the keyword parameters of `infer_request`."""

    model: str
    budget_s: float | None
    hard: bool
    min_quality: float | None
    variant: int | None
    priority: int
    min_confidence: float | None


def infer_request(
    image: Image,
    *,
    model: str = "",
    budget_s: float | None = None,
    hard: bool = False,
    min_quality: float | None = None,
    variant: int | None = None,
    priority: int = 0,
    min_confidence: float | None = None,
) -> inference_pb2.InferRequest:
    """Return the message of a `predict` call.

    `budget_s` is the latency budget in seconds, a hard deadline if `hard`. `min_quality` is in
    [0, 1]. `variant` is the id of the variant to run; if unset, the scheduler chooses. `priority`
    is 1 (highest) to 255 (lowest), 0 for the default. From `min_confidence` in [0, 1] on, the
    answer of a cheap variant suffices. Raises `TypeError` for an array of another
    type.
    """
    request = inference_pb2.InferRequest(
        model_name=model,
        hard_deadline=hard,
        min_quality=min_quality,
        variant_id=variant,
        priority=priority,
        min_confidence=min_confidence,
        latency_budget_us=microseconds(budget_s),
    )
    if isinstance(image, bytes):
        request.encoded_image = image
        return request
    if (data_type := DATA_TYPES.get(str(image.dtype))) is None:
        raise TypeError(f"image: expected uint8 or float32, got {image.dtype}")
    request.tensor.data_type = data_type
    request.tensor.shape.extend(image.shape)
    request.tensor.data = image.tobytes()
    return request


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to a `predict` call: classes or tensors of its images, and what the answer cost.

    `label` and `probability` are those of the first image's most probable class. `budget_source` is
    grpc_deadline, field, metadata or model_default; without a budget, all three budget fields are
    None. `all` holds up to five (label, probability) pairs of each image.

    A model that returns tensors instead of classes has `outputs`; its `label` is empty,
    `probability` NaN, and `logits` [0, 0].
    """

    label: str
    probability: float
    variant: int
    variant_name: str
    quality: float
    quality_metric: str
    queue_s: float
    compute_s: float
    total_s: float
    budget_s: float | None
    budget_source: str | None
    budget_met: bool | None
    batch_size: int
    all: list[list[tuple[str, float]]] = field(repr=False)
    response: inference_pb2.InferResponse = field(repr=False)
    stages: tuple[int, ...] = ()
    """Ids of the variants that ran, in order, if the request has `min_confidence`."""
    confidence: float | None = None
    """Least calibrated confidence of the images, if the request has `min_confidence`."""
    confidences: tuple[float, ...] = field(repr=False, default=())
    """Confidence of each image."""

    @property
    def logits(self) -> NDArray[np.float32]:
        """The scores [B, classes] of all classes; needs numpy."""
        return read_logits(self.response.predictions)

    @property
    def outputs(self) -> dict[str, NDArray[np.generic]]:
        """The outputs [B, ...] by their names of a model that returns tensors; needs numpy."""
        return {output.name: read_output(output) for output in self.response.outputs}

    @classmethod
    def from_response(cls, response: inference_pb2.InferResponse) -> Prediction:
        """Return the answer in a response."""
        cost = response.accounting
        classes = [[(c.label, c.probability) for c in p.top] for p in response.predictions]
        label, probability = classes[0][0] if classes else ("", math.nan)
        return cls(
            label=label,
            probability=probability,
            variant=cost.variant_id,
            variant_name=cost.variant_name,
            quality=cost.quality,
            quality_metric=cost.quality_metric,
            queue_s=cost.queue_us / 1e6,
            compute_s=cost.compute_us / 1e6,
            total_s=cost.total_us / 1e6,
            budget_s=cost.budget_us / 1e6 if cost.HasField("budget_us") else None,
            budget_source=BUDGET_SOURCES.get(cost.budget_source),
            budget_met=cost.budget_met if cost.HasField("budget_met") else None,
            batch_size=cost.batch_size,
            all=classes,
            response=response,
            stages=tuple(cost.stages),
            confidence=cost.confidence if cost.HasField("confidence") else None,
            confidences=tuple(
                p.confidence for p in response.predictions if p.HasField("confidence")
            ),
        )


def microseconds(seconds: float | None) -> int | None:
    """Return whole microseconds; None stays None."""
    return None if seconds is None else round(1e6 * seconds)

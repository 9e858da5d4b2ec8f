"""Image requests as messages, and their answers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ladderstitch.v1 import inference_pb2

Image = bytes | NDArray[np.uint8] | NDArray[np.float32]
"""A PNG or JPEG file, or [N, C, H, W]: uint8 pixels or preprocessed float32."""


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


def check_budget_request(
    budget_s: float | None, min_quality: float | None, model: str
) -> inference_pb2.CheckBudgetRequest:
    return inference_pb2.CheckBudgetRequest(
        model_name=model,
        latency_budget_us=None if budget_s is None else round(1e6 * budget_s),
        min_quality=min_quality,
    )

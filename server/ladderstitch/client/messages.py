"""Image requests as messages, and their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ladderstitch.v1 import generation_pb2, inference_pb2

Image = bytes | NDArray[np.uint8] | NDArray[np.float32]
"""A PNG or JPEG file, or [N, C, H, W]: uint8 pixels or preprocessed float32."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one call, for its first image; `all` holds every image's classes."""

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
            variant=cost.variant_id,
            variant_name=cost.variant_name,
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
    variant: int | None = None,
    priority: int = 0,
) -> inference_pb2.InferRequest:
    """The message of a `predict` call; raises `TypeError` for an array of another type."""
    request = inference_pb2.InferRequest(
        model_name=model,
        hard_deadline=hard,
        min_quality=min_quality,
        variant_id=variant,
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


FINISH = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}


@dataclass(frozen=True, slots=True)
class TextChunk:
    """One token of an answer; `finish` and `accounting` are set in the last one.

    `logprob` and `alternatives` (token, logprob) are there if they were asked for.
    """

    index: int
    token: int
    text: str
    finish: str | None
    accounting: generation_pb2.GenerationAccounting | None
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, response: generation_pb2.GenerateResponse) -> TextChunk:
        ended = response.finish_reason != generation_pb2.FINISH_REASON_UNSPECIFIED
        return cls(
            index=response.index,
            token=response.token_id,
            text=response.text,
            finish=FINISH[response.finish_reason] if ended else None,
            accounting=response.accounting if ended else None,
            logprob=response.logprob if response.HasField("logprob") else None,
            alternatives=tuple((top.token_id, top.logprob) for top in response.top_logprobs),
        )


def generate_request(
    prompt: str | Sequence[int],
    *,
    model: str = "",
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    budget_s: float | None = None,
    hard: bool = False,
    first_token_budget_s: float | None = None,
    token_budget_s: float | None = None,
    min_quality: float | None = None,
    variant: int | None = None,
    logprobs: int | None = None,
) -> generation_pb2.GenerateRequest:
    """The message of a `generate` call; the prompt is text or tokens.

    `budget_s` is for the whole answer, `token_budget_s` for the mean time between tokens after the
    first; `variant` pins a path of the model.
    """
    request = generation_pb2.GenerateRequest(
        model_name=model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        hard_deadline=hard,
        latency_budget_us=_microseconds(budget_s),
        first_token_budget_us=_microseconds(first_token_budget_s),
        token_budget_us=_microseconds(token_budget_s),
        min_quality=min_quality,
        variant_id=variant,
        logprobs=logprobs,
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.tokens.ids.extend(prompt)
    return request


def _microseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(1e6 * seconds)

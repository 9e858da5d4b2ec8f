"""An image from the page, answered as one that arrives by gRPC: same parsing, queue and budgets."""

from __future__ import annotations

import base64
import math
import time

from pydantic import BaseModel, ConfigDict, Field

from ladderstitch.api.deadlines import LatencyBudget, resolve_deadlines, seconds_from_ms
from ladderstitch.api.native.inference import build_predictions
from ladderstitch.api.page.models import Body, example_image
from ladderstitch.errors import InvalidArgument, RequestError
from ladderstitch.hosting.registry import ModelRegistry, VisionModel
from ladderstitch.scheduling.requests import ImageAnswer, Pixels, Request

MAX_IMAGE_BYTES = 1 << 20
"""Maximum size of an image from the page, which makes large ones smaller first."""
MAX_BODY_BYTES = 4 * MAX_IMAGE_BYTES // 3 + 4096
"""Maximum size of a request with such an image, in base64."""


class PagePrediction(BaseModel):
    """The body of a request: one example of the model's bundle, or an image in base64."""

    model_config = ConfigDict(extra="forbid")

    example: str | None = None
    image: str | None = None
    budget_ms: float | None = None
    hard: bool = Field(False, description="whether a late answer is an error")


async def predict(registry: ModelRegistry, name: str, fields: PagePrediction) -> Body:
    """Return the best classes of an image, and what the answer cost.

    Raises the `RequestError` that ends the request instead; the model counts it.
    """
    arrival = time.monotonic()
    model = registry.vision_model(name)
    try:
        accepted = await _accept(model, fields, arrival)
    except RequestError as error:
        model.scheduler.metrics.observe_rejection(error.code)
        raise
    answer = await model.scheduler.submit(accepted)
    return _describe(model, accepted, answer, registry.replica)


async def _accept(model: VisionModel, fields: PagePrediction, arrival: float) -> Request:
    """Return the request for the scheduler; raises `InvalidArgument` that names the field."""
    budgets = []
    if fields.budget_ms is not None:
        seconds = seconds_from_ms("budget_ms", str(fields.budget_ms))
        budgets.append(LatencyBudget(seconds, "latency_budget_us", fields.hard))
    elif fields.hard:
        raise InvalidArgument("hard", "expected budget_ms to be set along with it")
    if (default_us := model.bundle.manifest.default_budget_us) is not None:
        budgets.append(LatencyBudget(default_us / 1e6, "model_default"))
    images = await _read_image(model, fields)
    return Request("page", images, arrival, resolve_deadlines(arrival, budgets))


async def _read_image(model: VisionModel, fields: PagePrediction) -> Pixels:
    if (fields.example is None) == (fields.image is None):
        raise InvalidArgument("image", "expected either example or image to be set")
    if fields.example is not None:
        data = example_image(model, fields.example).read_bytes()
        return await model.reader.read_encoded("example", data)
    try:
        data = base64.b64decode(fields.image or "", validate=True)
    except ValueError as error:  # of its own, or for characters beyond ASCII
        raise InvalidArgument("image", f"expected base64, got {error}") from None
    if len(data) > MAX_IMAGE_BYTES:
        raise InvalidArgument("image", f"expected at most {MAX_IMAGE_BYTES} bytes, got {len(data)}")
    return await model.reader.read_encoded("image", data)


def _describe(model: VisionModel, accepted: Request, answer: ImageAnswer, replica: str) -> Body:
    """Return an answer as JSON; the classes are missing if the model returns tensors."""
    manifest, soft, now = model.bundle.manifest, accepted.deadlines.soft, time.monotonic()
    has_budget = soft != math.inf
    top = []
    if not manifest.outputs:
        best = build_predictions(answer.logits, manifest.labels)[0].top
        top = [{"label": found.label, "probability": found.probability} for found in best]
    return {
        "model": model.name,
        "replica": replica,
        "variant_id": answer.variant,
        "variant_name": model.variant_names[answer.variant],
        "quality": answer.quality,
        "queue_ms": round(1e3 * answer.queue_s, 3),
        "compute_ms": round(1e3 * answer.compute_s, 3),
        "total_ms": round(1e3 * (now - accepted.arrival), 3),
        "batch_size": answer.batch_size,
        "budget_ms": round(1e3 * (soft - accepted.arrival), 6) if has_budget else None,
        "met": now <= soft if has_budget else None,
        "top": top,
    }

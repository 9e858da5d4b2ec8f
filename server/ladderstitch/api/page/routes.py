"""The routes of the page: its files, which need no token, and its JSON API, which does.

Texts have no route here: the page asks for them by OpenAI's API.
"""

from __future__ import annotations

from fastapi import FastAPI, Query, Request
from fastapi.responses import Response

from ladderstitch.api.openai.body import parse_body
from ladderstitch.api.page.assets import PREFIX, page_assets
from ladderstitch.api.page.figures import describe_figures
from ladderstitch.api.page.models import (
    EXAMPLE_SUFFIXES,
    Body,
    describe_models,
    example_image,
)
from ladderstitch.api.page.predict import MAX_BODY_BYTES, PagePrediction, predict
from ladderstitch.hosting.registry import ModelRegistry

UNCACHED = {"cache-control": "no-store"}
"""Headers of answers that no cache may keep."""


def add_page(app: FastAPI, registry: ModelRegistry) -> None:
    """Add the page and its JSON API to the application."""

    @app.api_route("/", methods=["GET", "HEAD"])
    @app.api_route(PREFIX + "{path:path}", methods=["GET", "HEAD"])
    async def send_file(request: Request) -> Response:
        asset = page_assets().get(request.url.path)
        return Response(status_code=404) if asset is None else asset.respond(request)

    @app.get("/v1/page/models")
    async def list_models(response: Response) -> Body:
        response.headers.update(UNCACHED)
        return describe_models(registry)

    @app.get("/v1/page/models/{name}/figures")
    async def get_figures(
        name: str, response: Response, replica: str = "", after: int = Query(0, ge=0)
    ) -> Body:
        """Return the figures; `after` numbers an answer of `replica`, and of no other one."""
        response.headers.update(UNCACHED)
        known = after if replica == registry.replica else 0
        return describe_figures(registry.find(name), registry.replica, known)

    @app.get("/v1/page/models/{name}/examples/{example}")
    async def send_example(name: str, example: str) -> Response:
        path = example_image(registry.vision_model(name), example)
        return Response(path.read_bytes(), media_type=EXAMPLE_SUFFIXES[path.suffix.lower()])

    @app.post("/v1/page/models/{name}/predict")
    async def predict_image(name: str, request: Request) -> Body:
        return await predict(registry, name, await parse_body(request, PagePrediction))


def max_page_body_bytes(registry: ModelRegistry) -> int:
    """Return the size of the largest body that the page sends: an image if a model takes any."""
    return MAX_BODY_BYTES if registry.vision_models else 0

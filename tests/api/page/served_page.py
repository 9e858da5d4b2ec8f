"""An image model and its page in this process, and calls of its HTTP application.

The client, httpx2, comes with `openai`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import yaml

from ladderstitch.api.auth import AuthInterceptor
from ladderstitch.api.openai.app import create_app
from ladderstitch.api.page.models import EXAMPLES
from ladderstitch.config import ServerConfig
from ladderstitch.hosting.registry import LoadedModel, ModelRegistry, VisionModel
from ladderstitch.hosting.vision_runner import VisionRunner
from ladderstitch.security.tokens import RateLimiter, TokenFile
from ladderstitch.telemetry.metrics import Metrics
from tests.conftest import make_tiny_bundle
from tests.support.servers import picture

SECRET = "user-secret-16-letters"
MODEL = "/v1/page/models/tiny"
LIMIT_S = 300.0


@dataclass(frozen=True)
class ServedPage:
    """The registry of a replica with the model `tiny`, and a client of its HTTP application."""

    registry: ModelRegistry
    http: httpx.AsyncClient

    @property
    def model(self) -> VisionModel:
        """The model."""
        return self.registry.vision_model("tiny")

    async def get(self, path: str, **headers: str) -> Any:
        """Return the JSON of a successful answer."""
        answer = await self.http.get(path, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def predict(self, **fields: Any) -> httpx.Response:
        """Return the answer to a prediction."""
        return await self.http.post(f"{MODEL}/predict", json=fields)

    async def figures_after(self, num_answers: int) -> Any:
        """Return the figures when as many answers are counted, which is after they are sent."""
        async with asyncio.timeout(LIMIT_S):
            while (figures := await self.get(f"{MODEL}/figures"))["number"] < num_answers:  # noqa: ASYNC110 # no event
                await asyncio.sleep(0)
        assert figures["number"] == num_answers
        return figures


def write_examples(bundle: Path) -> None:
    """Add two example images, and a file that is none, to a bundle."""
    folder = bundle / EXAMPLES
    folder.mkdir()
    (folder / "first-01.png").write_bytes(picture())
    (folder / "second.jpg").write_bytes(picture(kind="JPEG"))
    (folder / "README.md").write_text("no image")


@asynccontextmanager
async def served_page(
    folder: Path, *, tokens: bool = False, page: bool = True
) -> AsyncIterator[ServedPage]:
    """Serve the model until the context ends; with `tokens`, callers need `SECRET`."""
    path = make_tiny_bundle(folder / "tiny").path
    write_examples(path)
    registry, auth = ModelRegistry("replica-7"), None
    config = ServerConfig(bundle=path, http_port=0)
    if tokens:
        file = folder / "tokens.yaml"
        file.write_text(yaml.safe_dump({"tokens": [{"name": "user", "token": SECRET}]}))
        file.chmod(0o600)
        auth = AuthInterceptor(TokenFile(file), RateLimiter(), lambda reason: None)
    runner = VisionRunner(config, registry, Metrics(keeps_activity=page))
    try:
        await runner.start(lambda done, total: None, _skip_rehearsal)
        registry.ready = True
        transport = httpx.ASGITransport(create_app(registry, auth, 64 << 20, page=page))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            yield ServedPage(registry, http)
    finally:
        await runner.close()


async def _skip_rehearsal(model: LoadedModel) -> None:
    """Do nothing: the first request of a test may be slow."""

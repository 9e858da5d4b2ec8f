"""A model on a stepped group behind the HTTP application, and requests to it."""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import yaml

from ladderstitch.api.auth import AuthInterceptor
from ladderstitch.api.openai.app import create_app
from ladderstitch.hosting.registry import ModelRegistry, TextModel
from ladderstitch.security.tokens import RateLimiter, TokenFile
from ladderstitch.telemetry.text_metrics import TextMetrics
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.chat_template import ChatTemplate
from tests.support.language_models import write_tiny
from tests.text.scheduler.stepped_group import SteppedScheduler

SECRET = "user-secret-16-letters"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
PATHS = {False: "/v1/completions", True: "/v1/chat/completions"}

Message = dict[str, Any]


def write_chat_bundle(folder: Path) -> TextBundle:
    """Write a tiny bundle with a chat template."""
    path = write_tiny(folder / "tiny")
    manifest = yaml.safe_load((path / "model.yaml").read_text())
    (path / "model.yaml").write_text(yaml.safe_dump(manifest | {"chat_template": TEMPLATE}))
    return TextBundle.load(path)


@functools.cache
def chat_template_of(path: Path) -> ChatTemplate | None:
    """Return the chat template of a bundle; its process serves all tests."""
    bundle = TextBundle.load(path)
    template = bundle.chat_template(bundle.tokenizer())
    if template is not None:
        atexit.register(template.close)
    return template


class ServedModel:
    """A scheduler on a stepped group, behind the application, for callers with one token."""

    def __init__(self, bundle: TextBundle) -> None:
        tokens = bundle.path.parent / "tokens.yaml"
        tokens.write_text(yaml.safe_dump({"tokens": [{"name": "user", "token": SECRET}]}))
        self.limiter = RateLimiter()
        self.auth = AuthInterceptor(TokenFile(tokens), self.limiter, lambda reason: None)
        self.scheduler = SteppedScheduler(bundle)
        self.counter = self.scheduler.counter
        self.registry = ModelRegistry("r", ready=True)
        metrics = cast("TextMetrics", self.counter)
        model = TextModel(bundle, self.scheduler, metrics, 100, chat_template_of(bundle.path))
        self.registry.add(model)
        self.app = create_app(self.registry, self.auth, 1 << 20)

    @property
    def in_flight(self) -> int:
        """The number of requests that count as in flight."""
        return self.limiter.in_flight("user")

    def assert_released(self) -> None:
        """Assert that no request is in flight, no sequence in progress and no block used."""
        assert self.in_flight == 0
        self.scheduler.assert_empty()


def request_body(chat: bool, **fields: Any) -> bytes:
    """Return the body of a completion or of a chat request, greedy unless `fields` say so."""
    prompt = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    return json.dumps({"model": "tiny", "temperature": 0} | prompt | fields).encode()


def raw_request(chat: bool, **fields: Any) -> bytes:
    """Return the bytes of an HTTP request."""
    body = request_body(chat, **fields)
    head = (
        f"POST {PATHS[chat]} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {SECRET}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class AsgiCall:
    """One request to an ASGI application by a client that disconnects when the test says so."""

    def __init__(self, chat: bool, *, spec_version: str = "2.3", **fields: Any) -> None:
        body = request_body(chat, **fields)
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": spec_version},
            "method": "POST",
            "path": PATHS[chat],
            "query_string": b"",
            "headers": [
                (b"authorization", f"Bearer {SECRET}".encode()),
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
            ],
        }
        self.disconnected = asyncio.Event()
        self.sent: list[Message] = []
        self._body: bytes | None = body

    async def run(self, served: ServedModel, on_send: Callable[[Message], Any]) -> None:
        """Run the application; `on_send` gets every message and may return an awaitable."""

        async def receive() -> Message:
            if self._body is not None:
                body, self._body = self._body, None
                return {"type": "http.request", "body": body, "more_body": False}
            await self.disconnected.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            self.sent.append(message)
            if (waiting := on_send(message)) is not None:
                await waiting

        await served.app(self.scope, receive, send)

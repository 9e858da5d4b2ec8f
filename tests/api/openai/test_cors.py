"""Browsers may call the HTTP port from the pages of configured origins only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ladderstitch.api.openai.app import create_app
from ladderstitch.config import ServerConfig
from tests.api.openai.served_model import PATHS, SECRET, ServedModel, write_chat_bundle

ORIGIN = "https://app.example.org"
PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-latency-budget-ms",
}


async def answer(
    folder: Path,
    origins: Sequence[str],
    method: str,
    headers: dict[str, str],
    *,
    trusts_loopback: bool = False,
) -> tuple[int, dict[str, str]]:
    """Return status and headers of the answer to a request for the models, or before a chat."""
    served = ServedModel(write_chat_bundle(folder))
    app = create_app(
        served.registry,
        served.auth,
        1 << 20,
        cors_origins=origins,
        trusts_loopback=trusts_loopback,
    )
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": PATHS[True] if method == "OPTIONS" else "/v1/models",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    await app(scope, receive, send)
    await served.scheduler.close()
    return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}


@pytest.mark.parametrize("origins", [(ORIGIN,), ("https://other.example", ORIGIN), ("*",)])
async def test_browser_of_a_configured_origin_may_call(
    tmp_path: Path, origins: Sequence[str]
) -> None:
    asked, asked_headers = await answer(tmp_path, origins, "OPTIONS", PREFLIGHT)
    assert asked == 200
    assert asked_headers["access-control-allow-origin"] in (ORIGIN, "*")
    assert "authorization" in asked_headers["access-control-allow-headers"].lower()
    token = {"authorization": f"Bearer {SECRET}", "origin": ORIGIN}
    called, called_headers = await answer(tmp_path / "2", origins, "GET", token)
    assert called == 200
    assert called_headers["access-control-allow-origin"] in (ORIGIN, "*")
    rejected, rejected_headers = await answer(tmp_path / "3", origins, "GET", {"origin": ORIGIN})
    assert rejected == 401
    assert rejected_headers["access-control-allow-origin"] in (ORIGIN, "*")


@pytest.mark.parametrize("origins", [(), ("https://other.example",), (f"{ORIGIN}:8443",)])
async def test_browser_of_another_origin_may_not_call(
    tmp_path: Path, origins: Sequence[str]
) -> None:
    asked, asked_headers = await answer(tmp_path, origins, "OPTIONS", PREFLIGHT)
    assert asked >= 400
    assert "access-control-allow-origin" not in asked_headers
    token = {"authorization": f"Bearer {SECRET}", "origin": ORIGIN}
    called, called_headers = await answer(tmp_path / "2", origins, "GET", token)
    assert called == 200
    assert "access-control-allow-origin" not in called_headers


def test_configured_origins_are_checked() -> None:
    assert ServerConfig(cors_origins=("*", ORIGIN, "chrome-extension://x")).cors_origins
    for wrong in ("app.example.org", f"{ORIGIN}/", "", "https://"):
        with pytest.raises(ValidationError, match=r"cors_origins\n.*expected \* or e\.g\."):
            ServerConfig(cors_origins=(wrong,))


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:3000", True),
        ("http://127.0.0.1", True),
        ("https://[::1]:8443", True),
        ("http://localhost.example.org", False),
        ("http://127.0.0.1.example.org:80", False),
        ("https://app.example.org", False),
        ("null", False),
    ],
)
async def test_loopback_server_trusts_pages_of_this_machine(
    tmp_path: Path, origin: str, allowed: bool
) -> None:
    asked, headers = await answer(
        tmp_path, (), "OPTIONS", PREFLIGHT | {"origin": origin}, trusts_loopback=True
    )
    assert (asked == 200) == allowed
    assert ("access-control-allow-origin" in headers) == allowed

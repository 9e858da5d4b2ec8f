"""A server on loopback without tokens answers under its own names only (DNS rebinding)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from pydantic import ValidationError

from ladderstitch.api.auth import AuthInterceptor
from ladderstitch.api.openai.app import replica_app
from ladderstitch.config import ServerConfig
from ladderstitch.gateway.config import GatewayConfig
from tests.api.openai.served_model import SECRET, ServedModel, write_chat_bundle

FOREIGN = "evil.example"


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[ServedModel]:
    served = ServedModel(write_chat_bundle(tmp_path))
    yield served
    await served.scheduler.close()


async def get(
    served: ServedModel,
    name: str,
    path: str = "/v1/models",
    auth: AuthInterceptor | None = None,
    **fields: Any,
) -> httpx.Response:
    """Return the response to a request under a name, to a server with these settings."""
    app = replica_app(ServerConfig(http_port=0, page="on", **fields), served.registry, auth)
    headers = {"host": name, "authorization": f"Bearer {SECRET}"}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        return await client.get(path, headers=headers)


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8081",
        "127.0.0.1",
        "127.0.0.1:1",
        "127.0.0.2:8081",
        "[::1]",
        "[::1]:8081",
        "own.example.org",
        "Own.Example.org:443",
    ],
)
async def test_own_names_are_answered(served: ServedModel, host: str) -> None:
    response = await get(served, host, allowed_hosts=("own.example.ORG",))
    assert response.status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/", "/health", "/page/models", "/nowhere"])
@pytest.mark.parametrize(
    "host",
    [
        FOREIGN,
        f"{FOREIGN}:8081",
        "localhost.evil.example",
        "127.0.0.1.evil.example:8081",
        "10.0.0.1",
        "[::2]:8081",
        "",
        "localhost@evil.example",
    ],
)
async def test_other_names_are_refused(served: ServedModel, host: str, path: str) -> None:
    response = await get(served, host, path, allowed_hosts=("own.example.org",))
    assert response.status_code == 421
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("HOST_NOT_ALLOWED", "host")
    assert "--allowed-host" in error["message"]
    assert repr(host) in error["message"]
    assert response.headers["x-request-id"]


async def test_every_name_may_be_allowed(served: ServedModel) -> None:
    assert (await get(served, FOREIGN, allowed_hosts=("*",))).status_code == 200


async def test_bound_address_is_allowed_in_brackets_too(served: ServedModel) -> None:
    assert (await get(served, "[::1]:8081", host="[::1]")).status_code == 200
    assert (await get(served, FOREIGN, host="[::1]")).status_code == 421


async def test_tokens_and_public_addresses_need_no_check(served: ServedModel) -> None:
    assert (await get(served, FOREIGN, auth=served.auth)).status_code == 200
    public = await get(served, FOREIGN, host="0.0.0.0", insecure_public=True)
    assert public.status_code == 200


@pytest.mark.parametrize("config", [ServerConfig, GatewayConfig])
def test_configured_names_are_checked(config: type[ServerConfig | GatewayConfig]) -> None:
    assert config(allowed_hosts=("*", "a.example.org", "[::1]", "a_b")).allowed_hosts
    for wrong in ("http://a.example.org", "a.example.org:80", "", "a b", "[::1]:80"):
        with pytest.raises(ValidationError, match=r"allowed_hosts\n.*expected \* or a name"):
            config(allowed_hosts=(wrong,))

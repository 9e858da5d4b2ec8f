"""The HTTP connections of a gateway to its replicas."""

from __future__ import annotations

import io
import ssl

import aiohttp
from yarl import URL

from ladderstitch.addresses import join_address, split_address
from ladderstitch.gateway.config import GatewayConfig
from ladderstitch.gateway.http_request import HttpRequest
from ladderstitch.gateway.replica_connection import ReplicaConnection

ADDED_HEADERS = ("accept", "accept-encoding", "content-type", "user-agent")
"""Headers that the client of replicas would add by itself."""


class ReplicaClient:
    """The HTTP connections to all replicas; create it inside a running event loop."""

    def __init__(self, config: GatewayConfig) -> None:
        """Open no connection yet. Raises `OSError` and `ValueError` for unfit certificates."""
        self._tls = _tls_context(config)
        self._server_name = config.replica_server_name
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0),
            auto_decompress=False,
            skip_auto_headers=ADDED_HEADERS,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    def open(
        self, replica: ReplicaConnection, request: HttpRequest
    ) -> aiohttp.client._RequestContextManager:
        """Send a request to a replica; the result is a context manager of the response."""
        state = replica.state
        assert state is not None, "a replica that serves has reported its state"
        host, _ = split_address(replica.address)
        scheme = "http" if self._tls is None else "https"
        address = join_address(host, state.http_port)
        headers = [(name.decode("latin-1"), v.decode("latin-1")) for name, v in request.headers]
        return self._session.request(
            request.method,
            URL(f"{scheme}://{address}{request.target}", encoded=True),
            headers=headers,
            data=io.BytesIO(request.body) if request.body else None,
            allow_redirects=False,
            ssl=self._tls if self._tls is not None else True,
            server_hostname=self._server_name,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()


def _tls_context(config: GatewayConfig) -> ssl.SSLContext | None:
    """Return the TLS context of connections to replicas; None for plain connections."""
    if not (config.replica_tls or config.replica_ca or config.replica_certificate):
        return None
    context = ssl.create_default_context(cafile=config.replica_ca)
    if config.replica_certificate is not None and config.replica_key is not None:
        context.load_cert_chain(config.replica_certificate, config.replica_key)
    return context

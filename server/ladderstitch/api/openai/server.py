"""The HTTP server of a replica; it shares loop, certificates and tokens with the gRPC servers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import ssl
from collections.abc import Iterator

import uvicorn

from ladderstitch.api.auth import AuthInterceptor
from ladderstitch.api.listener import certificate_files
from ladderstitch.api.openai.app import create_app
from ladderstitch.api.openai.protocol import ConnectionLimits, LimitedProtocol
from ladderstitch.config import ServerConfig
from ladderstitch.hosting.registry import ModelRegistry
from ladderstitch.runtime.process import address_family
from ladderstitch.security.listen_config import join_address, strip_brackets
from ladderstitch.security.tls import CertificateWatcher

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 1.0
"""Seconds between checks whether a certificate file has changed."""


class _UvicornServer(uvicorn.Server):
    """A server that leaves signals to the replica."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """The HTTP server of OpenAI's API; it listens from `start` until `stop`."""

    def __init__(
        self, config: ServerConfig, registry: ModelRegistry, auth: AuthInterceptor | None
    ) -> None:
        """Prepare the server; without `auth`, callers need no token.

        Raises `ConfigError` if the certificate files cannot be used.
        """
        self.port = 0
        self._config = config
        files = certificate_files(config)
        self._watcher = None if files is None else CertificateWatcher(files)
        limits = ConnectionLimits(
            config.max_connections, config.header_timeout_s, config.message_timeout_s
        )
        application = create_app(
            registry,
            auth,
            config.max_message_mb << 20,
            body_timeout_s=config.message_timeout_s,
            max_unfinished=config.max_unfinished_messages,
            cors_origins=config.cors_origins,
        )
        settings = uvicorn.Config(
            application,
            http=LimitedProtocol.with_limits(limits),
            timeout_keep_alive=math.ceil(config.idle_timeout_s),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ssl_certfile=config.tls_certificate,
            ssl_keyfile=config.tls_key,
            ssl_ca_certs=str(config.tls_client_ca) if config.tls_client_ca else None,
            ssl_cert_reqs=ssl.CERT_REQUIRED if config.tls_client_ca else ssl.CERT_NONE,
            timeout_graceful_shutdown=1,
        )
        self._server = _UvicornServer(settings)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, port: int, *, share_port: bool = False) -> int:
        """Bind and listen; returns the bound port. Raises `OSError` if it is taken."""
        host = strip_brackets(self._config.host)
        listening = socket.socket(address_family(host))
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share_port:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            listening.bind((host, port))
            listening.listen()
        except OSError as error:
            listening.close()
            reason = error.strerror or str(error)
            raise OSError(f"cannot listen on {join_address(host, port)}: {reason}") from error
        self.port = listening.getsockname()[1]
        self._tasks = [asyncio.create_task(self._server.serve([listening]), name="http")]
        if self._watcher is not None:
            watching = self._follow_certificate(self._watcher)
            self._tasks.append(asyncio.create_task(watching, name="http-tls"))
        return self.port

    async def stop(self) -> None:
        """Reject new requests; cancel those that are still in flight after one second."""
        self._server.should_exit = True
        if self._tasks:
            await self._tasks[0]
        for task in self._tasks[1:]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow_certificate(self, watcher: CertificateWatcher) -> None:
        """Load changed certificate files, which new connections then use."""
        files, context = watcher.files, self._server.config.ssl
        assert context is not None, "the server was started with a certificate"
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            if watcher.read_change() is None:
                continue
            try:
                context.load_cert_chain(files.certificate, files.key)
                if files.client_ca is not None:
                    context.load_verify_locations(files.client_ca)
            except (OSError, ssl.SSLError) as error:  # a file changed again after the check
                log.warning("certificate rejected, keeping the old one: %s", error)

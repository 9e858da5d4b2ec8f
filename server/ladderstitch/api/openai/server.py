"""The HTTP server beside a replica's gRPC servers: same loop, same certificates, same tokens."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Iterator

import uvicorn

from ladderstitch.api.auth import AuthInterceptor
from ladderstitch.api.openai.app import build
from ladderstitch.config import ServerConfig
from ladderstitch.hosting.registry import ModelRegistry
from ladderstitch.security.tls import CertificateFiles

log = logging.getLogger(__name__)

REREAD_S = 1.0


class _Quiet(uvicorn.Server):
    """Signals are the replica's business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Listens from `start` on."""

    def __init__(
        self, config: ServerConfig, registry: ModelRegistry, guard: AuthInterceptor | None
    ) -> None:
        self.port = 0
        self._config = config
        self._files = _certificates(config)
        settings = uvicorn.Config(
            build(registry, guard, config.max_message_mb << 20),
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
        self._server = _Quiet(settings)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, port: int, *, share_port: bool = False) -> int:
        """Bind and listen; the bound port. Raises `OSError` if it is taken."""
        listening = socket.socket(socket.AF_INET)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share_port:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            listening.bind((self._config.host, port))
            listening.listen()
        except OSError as error:
            listening.close()
            raise OSError(f"cannot listen on {self._config.host}:{port}: {error}") from error
        self.port = listening.getsockname()[1]
        self._tasks = [asyncio.create_task(self._server.serve([listening]), name="http")]
        if self._files is not None:
            self._tasks.append(asyncio.create_task(self._reread(self._files), name="http-tls"))
        return self.port

    async def stop(self) -> None:
        """Take no new requests; those in flight have a second to end."""
        self._server.should_exit = True
        if self._tasks:
            await self._tasks[0]
        for task in self._tasks[1:]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _reread(self, files: CertificateFiles) -> None:
        """Connections from now on see the files' newest certificate."""
        stamp = files.stamp()
        context = self._server.config.ssl
        assert context is not None, "the server was started with a certificate"
        while True:
            await asyncio.sleep(REREAD_S)
            try:
                now = files.stamp()
                if now == stamp:
                    continue
                files.check()
                context.load_cert_chain(files.certificate, files.key)
                if files.client_ca is not None:
                    context.load_verify_locations(files.client_ca)
            except Exception as error:
                log.warning("the old certificate stays in force: %s", error)
                continue
            stamp = now


def _certificates(config: ServerConfig) -> CertificateFiles | None:
    if config.tls_certificate is None or config.tls_key is None:
        return None
    return CertificateFiles(config.tls_certificate, config.tls_key, config.tls_client_ca)

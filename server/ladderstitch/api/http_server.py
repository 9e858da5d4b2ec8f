"""The HTTP server of a replica or a gateway, with the certificates of its gRPC servers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from ladderstitch.addresses import join_address, strip_brackets
from ladderstitch.api.listener import certificate_files
from ladderstitch.api.openai.protocol import ConnectionLimits, LimitedProtocol
from ladderstitch.runtime.process import address_family
from ladderstitch.security.listen_config import ListenConfig
from ladderstitch.security.tls import CertificateFiles, CertificateWatcher

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 1.0
"""Seconds between checks whether a certificate file has changed."""


class _UvicornServer(uvicorn.Server):
    """A server that leaves signals to the replica.

    Connections make the handshake of `tls` themselves, except on uvloop, whose `start_tls` does not
    work for servers (0.23): there, the loop makes it.
    """

    def __init__(
        self, config: uvicorn.Config, limits: ConnectionLimits, tls: ssl.SSLContext | None
    ) -> None:
        super().__init__(config)
        self._limits, self._tls = limits, tls

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        is_asyncio = isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop)
        own, loops = (self._tls, None) if is_asyncio else (None, self._tls)
        self.config.http_protocol_class = LimitedProtocol.with_limits(self._limits, own)
        self.config.ssl = loops
        await super().startup(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """The HTTP server of a replica or a gateway; it listens from `start` until `stop`."""

    def __init__(self, config: ListenConfig, application: ASGIApp) -> None:
        """Prepare the server; raises `ConfigError` if the certificate files cannot be used."""
        self.port = 0
        self._config = config
        files = certificate_files(config)
        self._watcher = None if files is None else CertificateWatcher(files)
        limits = ConnectionLimits(
            config.max_connections, config.header_timeout_s, config.message_timeout_s
        )
        self._tls = None if files is None else server_context(files)
        settings = uvicorn.Config(
            application,
            http=LimitedProtocol,
            timeout_keep_alive=math.ceil(config.idle_timeout_s),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
        self._server = _UvicornServer(settings, limits, self._tls)
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
        assert self._tls is not None, "the server was started with a certificate"
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            if watcher.read_change() is None:
                continue
            try:
                load_files(self._tls, watcher.files)
            except (OSError, ssl.SSLError) as error:  # a file changed again after the check
                log.warning("certificate rejected, keeping the old one: %s", error)


def server_context(files: CertificateFiles) -> ssl.SSLContext:
    """Return the TLS context of a server with these files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_NONE if files.client_ca is None else ssl.CERT_REQUIRED
    load_files(context, files)
    return context


def load_files(context: ssl.SSLContext, files: CertificateFiles) -> None:
    """Let new handshakes use these files; raises `OSError` if they cannot be used."""
    context.load_cert_chain(files.certificate, files.key)
    if files.client_ca is not None:
        context.load_verify_locations(files.client_ca)

"""How gRPC servers listen: addresses, limits, TLS, authentication and request log."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import grpc

from ladderstitch.addresses import join_address
from ladderstitch.api.auth import AuthInterceptor
from ladderstitch.api.receiving import ReceiveInterceptor
from ladderstitch.api.request_log import RequestLogInterceptor
from ladderstitch.errors import ConfigError
from ladderstitch.runtime.process import reserve_port
from ladderstitch.security.listen_config import ListenConfig
from ladderstitch.security.tls import CertificateData, CertificateFiles, CertificateWatcher
from ladderstitch.security.tokens import RateLimiter, Token, TokenFile
from ladderstitch.telemetry.logs import RecordSink

REUSE_PORT = "grpc.so_reuseport"
IDENTITY_ONLY = 1
"""Bit set of the compression algorithms of requests: a small message could inflate to gigabytes."""
MAX_PING_STRIKES = 2
MAX_METADATA_BYTES = 16 << 10
"""Maximum size of the metadata of a call.

It is both limits of gRPC: between its default ones, 8 and 16 KiB, calls are rejected at random.
"""
Address = tuple[str, int]
"""Host and port."""


@dataclass(frozen=True, slots=True)
class ListenerConfig:
    """The configuration that all gRPC servers of one replica or gateway share.

    `max_connection_age_s` is unset for connections without a maximum age. `admin` and `health` are
    the addresses of separate servers: without `admin`, the admin rpcs are on the main port; without
    `health`, there is no plaintext health port.
    """

    max_message_bytes: int = 64 << 20
    max_streams: int = 1000
    max_connections: int = 1000
    header_timeout_s: float = 10.0
    idle_timeout_s: float = 300.0
    min_ping_interval_s: float = 0.5
    keepalive_s: float = 60.0
    max_connection_age_s: float | None = None
    max_connection_grace_s: float = 30.0
    share_port: bool = False  # in a rolling update, the old and the new process listen for a while
    certificates: CertificateFiles | None = None
    receive: ReceiveInterceptor = field(default_factory=ReceiveInterceptor)
    request_log: RequestLogInterceptor | None = None
    auth: AuthInterceptor | None = None
    admin: Address | None = None
    health: Address | None = None

    @classmethod
    def from_config(
        cls,
        config: ListenConfig,
        on_denied: Callable[[str], None],
        sinks: Sequence[RecordSink] = (),
        *,
        share_port: bool = False,
        watch_token: str | None = None,
    ) -> ListenerConfig:
        """Return the listener configuration of a server.

        `on_denied` is called with the reason of each denied call, `sinks` with a record of each
        finished request. `watch_token` is the token of a gateway, valid in addition to the token
        file. Raises `ConfigError` if the certificate or the token file cannot be used.
        """
        auth = admin = health = None
        if config.token_file is not None:
            extra = () if watch_token is None else (Token(name="gateway", token=watch_token),)
            tokens = TokenFile(config.token_file, extra=extra)
            auth = AuthInterceptor(tokens, RateLimiter(), on_denied)
        if config.admin_port is not None:
            admin = (config.admin_host, config.admin_port)
        if config.health_port is not None:
            health = (config.host, config.health_port)
        files = certificate_files(config)
        if files is not None:
            server_credentials(files)  # an error is raised now, not when the server starts
        return cls(
            max_message_bytes=config.max_message_mb << 20,
            max_streams=config.max_streams,
            max_connections=config.max_connections,
            header_timeout_s=config.header_timeout_s,
            receive=ReceiveInterceptor(config.max_unfinished_messages, config.message_timeout_s),
            idle_timeout_s=config.idle_timeout_s,
            min_ping_interval_s=config.min_ping_interval_s,
            max_connection_age_s=config.max_connection_age_s,
            max_connection_grace_s=config.max_connection_grace_s,
            share_port=share_port,
            certificates=files,
            request_log=RequestLogInterceptor(sinks) if sinks else None,
            auth=auth,
            admin=admin,
            health=health,
        )

    def create_server(self, *, share_port: bool = False) -> grpc.aio.Server:
        """Return a server with these limits, the request log and authentication.

        With `share_port`, further servers may bind to its port.
        """
        found = (self.receive, self.request_log, self.auth)
        interceptors = [interceptor for interceptor in found if interceptor is not None]
        options = [*self.server_options(), (REUSE_PORT, int(share_port or self.share_port))]
        return grpc.aio.server(options=options, interceptors=interceptors)

    def create_health_server(self) -> grpc.aio.Server:
        """Return a server with these limits for probes, which need no token and are not logged."""
        return grpc.aio.server(options=self.server_options(), interceptors=[self.receive])

    def server_options(self) -> list[tuple[str, int]]:
        """Return the gRPC options of the limits."""
        options = [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_concurrent_streams", self.max_streams),
            ("grpc.max_metadata_size", MAX_METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
            ("grpc.keepalive_time_ms", round(1e3 * self.keepalive_s)),
            (
                "grpc.http2.min_ping_interval_without_data_ms",
                round(1e3 * self.min_ping_interval_s),
            ),
            ("grpc.http2.max_ping_strikes", MAX_PING_STRIKES if self.min_ping_interval_s else 0),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.compression_enabled_algorithms_bitset", IDENTITY_ONLY),
            ("grpc.http2.bdp_probe", 0),  # the window of a call that is not read stays 64 KiB
            ("grpc.max_allowed_incoming_connections", self.max_connections),
            ("grpc.server_handshake_timeout_ms", round(1e3 * self.header_timeout_s)),
            ("grpc.max_connection_idle_ms", round(1e3 * self.idle_timeout_s)),
        ]
        if self.max_connection_age_s is not None:
            options += [
                ("grpc.max_connection_age_ms", round(1e3 * self.max_connection_age_s)),
                ("grpc.max_connection_age_grace_ms", round(1e3 * self.max_connection_grace_s)),
            ]
        return options


def reserve(address: Address) -> list[socket.socket]:
    """Return sockets that keep other servers from an address until `release_ports`.

    Raises `OSError` if it is taken, or if this machine does not have it.
    """
    try:
        return reserve_port(*address)
    except OSError as error:
        raise OSError(f"cannot listen on {join_address(*address)}: {error.strerror}") from error


@contextlib.contextmanager
def name_port(field: str) -> Iterator[None]:
    """Raise `ConfigError` that names the field of a port instead of the `OSError` of its server."""
    try:
        yield
    except OSError as error:
        flag = field.replace("_", "-")
        raise ConfigError(f"{field}: {error}; choose another one with --{flag}") from error


def bind(server: grpc.aio.Server, address: Address, certificates: CertificateFiles | None) -> int:
    """Bind a server to an address; returns the bound port.

    Without `certificates` it speaks plaintext. Raises `OSError` if the address is taken, and
    `ConfigError` if the certificates cannot be used.
    """
    target = join_address(*address)
    try:
        if certificates is None:
            return int(server.add_insecure_port(target))
        return int(server.add_secure_port(target, server_credentials(certificates)))
    except RuntimeError as error:
        raise OSError(f"cannot listen on {target}: another process may listen there") from error


async def start_servers(servers: Iterable[grpc.aio.Server]) -> None:
    """Start bound servers; a cancellation waits until all of them have started.

    `grpc.aio` cannot stop a server whose start was cancelled.
    """
    starting = asyncio.gather(*(server.start() for server in servers))
    try:
        await asyncio.shield(starting)
    except asyncio.CancelledError:
        await starting
        raise


def certificate_files(config: ListenConfig) -> CertificateFiles | None:
    """Return the certificate files of a configuration, or None for plaintext."""
    if config.tls_certificate is None or config.tls_key is None:
        return None
    return CertificateFiles(config.tls_certificate, config.tls_key, config.tls_client_ca)


def server_credentials(files: CertificateFiles) -> grpc.ServerCredentials:
    """Return credentials that use the current certificate files in every handshake.

    Open connections keep the certificate that they started with. The credentials are for one port:
    gRPC reads the first certificate only once. Raises `ConfigError` if the files cannot be used.
    """
    watcher = CertificateWatcher(files)

    def read_change() -> grpc.ServerCertificateConfiguration | None:
        data = watcher.read_change()
        return None if data is None else _certificate_configuration(data)

    return grpc.dynamic_ssl_server_credentials(
        _certificate_configuration(watcher.initial),
        read_change,
        require_client_authentication=files.client_ca is not None,
    )


def _certificate_configuration(data: CertificateData) -> grpc.ServerCertificateConfiguration:
    pair = (data.key, data.certificate)
    return grpc.ssl_server_certificate_configuration([pair], data.client_ca)

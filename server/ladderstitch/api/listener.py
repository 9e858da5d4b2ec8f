"""How a replica's gRPC servers listen: ports, limits, encryption, who is let in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc

from ladderstitch.api.auth import AuthInterceptor
from ladderstitch.api.request_log import RequestLogInterceptor
from ladderstitch.security.listen_config import ListenConfig
from ladderstitch.security.tls import CertificateFiles, RotatingCertificates
from ladderstitch.security.tokens import Limits, Token, TokenFile
from ladderstitch.telemetry.logs import RecordSink


@dataclass(frozen=True, slots=True)
class ListenerConfig:
    """What the servers of one replica share; connections have no maximum age unless one is set.

    `admin` and `health` are addresses of servers of their own; unset: admin rpcs are on the main
    port, and there is no plaintext health port.
    """

    max_message_bytes: int = 64 << 20
    max_streams: int = 1000
    keepalive_s: float = 60.0
    max_connection_age_s: float | None = None
    max_connection_grace_s: float = 30.0
    share_port: bool = False  # a rolling replacement needs both to listen for a while
    credentials: grpc.ServerCredentials | None = None
    observer: RequestLogInterceptor | None = None
    guard: AuthInterceptor | None = None
    admin: tuple[str, int] | None = None
    health: tuple[str, int] | None = None

    @classmethod
    def of(
        cls,
        settings: ListenConfig,
        denied: Callable[[str], None],
        sinks: Sequence[RecordSink] = (),
        *,
        share_port: bool = False,
        watch_token: str | None = None,
    ) -> ListenerConfig:
        """`watch_token` lets a gateway in that shares it, beside those of the token file.

        Raises `ConfigError` if certificate or token file cannot be used.
        """
        credentials = guard = admin = health = None
        if settings.tls_certificate is not None and settings.tls_key is not None:
            files = CertificateFiles(
                settings.tls_certificate, settings.tls_key, settings.tls_client_ca
            )
            credentials = RotatingCertificates(files).credentials()
        if settings.token_file is not None:
            ours = () if watch_token is None else (Token(name="gateway", token=watch_token),)
            guard = AuthInterceptor(TokenFile(settings.token_file, ours=ours), Limits(), denied)
        if settings.admin_port is not None:
            admin = (settings.admin_host, settings.admin_port)
        if settings.health_port is not None:
            health = (settings.host, settings.health_port)
        return cls(
            max_message_bytes=settings.max_message_mb << 20,
            max_streams=settings.max_streams,
            max_connection_age_s=settings.max_connection_age_s,
            max_connection_grace_s=settings.max_connection_grace_s,
            share_port=share_port,
            credentials=credentials,
            observer=RequestLogInterceptor(sinks) if sinks else None,
            guard=guard,
            admin=admin,
            health=health,
        )

    def server(self) -> grpc.aio.Server:
        """A server with these limits, and the guard at its door."""
        watchers = [watcher for watcher in (self.observer, self.guard) if watcher is not None]
        return grpc.aio.server(options=self.options(), interceptors=watchers)

    def options(self) -> list[tuple[str, int]]:
        options = [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_concurrent_streams", self.max_streams),
            ("grpc.keepalive_time_ms", round(1e3 * self.keepalive_s)),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.so_reuseport", int(self.share_port)),
        ]
        if self.max_connection_age_s is not None:
            options += [
                ("grpc.max_connection_age_ms", round(1e3 * self.max_connection_age_s)),
                ("grpc.max_connection_age_grace_ms", round(1e3 * self.max_connection_grace_s)),
            ]
        return options


def bind(
    server: grpc.aio.Server, where: tuple[str, int], credentials: grpc.ServerCredentials | None
) -> int:
    """Have a server listen there; the bound port. Raises `OSError` if it is taken."""
    address = f"{where[0]}:{where[1]}"
    try:
        if credentials is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, credentials))
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: is another server there?") from error

"""How a gateway is configured: a YAML file, command-line flags over it, checked once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from ladderstitch.client.channel import Access
from ladderstitch.errors import ConfigError
from ladderstitch.security.listen_config import ListenSettings

DNS = "dns:"
"""Before HOST:PORT: every address that the name has, looked up again and again."""


class GatewaySettings(ListenSettings):
    """Where callers reach a gateway, and how it reaches the replicas."""

    replicas: tuple[str, ...] = Field(
        (), description="HOST:PORT each, or dns:HOST:PORT for all addresses that a name has"
    )
    share_port: bool = Field(False, description="several gateways of a machine listen on one port")
    replica_tls: bool = Field(False, description="TLS with the system's authorities")
    replica_ca: Path | None = Field(None, description="PEM of who signed replicas' certificates")
    replica_certificate: Path | None = Field(None, description="PEM to show to replicas")
    replica_key: Path | None = Field(None, description="its key")
    replica_server_name: str | None = Field(
        None, description="name in replicas' certificates, if not that of their address"
    )
    replica_token_file: Path | None = Field(
        None, description="holds a token to watch replicas with; callers' tokens are passed on"
    )
    patience_s: float = Field(
        30.0, gt=0, description="longest that a request waits for a replica; its deadline counts"
    )
    held_mb: int = Field(512, ge=1, description="requests held at once, MiB; more are refused")
    announce_s: float = Field(0.5, ge=0, description="on the way down: unready, but answering")
    drain_s: float = Field(20.0, ge=0, description="time for requests under way on shutdown")
    log_format: Literal["text", "json"] = "text"

    @field_validator("replicas")
    @classmethod
    def _hosts_and_ports(cls, replicas: tuple[str, ...]) -> tuple[str, ...]:
        for replica in replicas:
            host, _, port = replica.removeprefix(DNS).rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) < 65_536:
                raise ValueError(f"expected HOST:PORT or dns:HOST:PORT, got {replica!r}")
        return replicas

    @property
    def access(self) -> Access:
        """To the replicas; raises `ConfigError` if the token cannot be read."""
        token = None
        if self.replica_token_file is not None:
            try:
                token = self.replica_token_file.read_text().strip()
            except OSError as error:
                raise ConfigError(f"replica_token_file: {error}") from error
        return Access(
            self.replica_ca,
            self.replica_certificate,
            self.replica_key,
            token,
            self.replica_tls,
            self.replica_server_name,
        )

"""Configuration of a gateway: a YAML file, overridden by command-line options, checked once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic.config import JsonDict

from ladderstitch.client.channel import Credentials
from ladderstitch.errors import ConfigError
from ladderstitch.security.listen_config import LIMITS, ListenConfig

DNS = "dns:"
"""Prefix of HOST:PORT: every address of the name, looked up periodically."""
REPLICAS: JsonDict = {"panel": "Connections to replicas"}


class GatewayConfig(ListenConfig):
    """Where callers reach a gateway, and how it reaches the replicas."""

    replicas: tuple[str, ...] = Field(
        (),
        description="HOST:PORT of a replica, once per replica; or dns:HOST:PORT for every address "
        "that a name has, looked up every two seconds",
        json_schema_extra={"flags": ["--replica"]},
    )
    share_port: bool = Field(
        False, description="let several gateways of one machine listen on the same ports"
    )
    drain_announce_s: float = Field(
        0.5, ge=0, description="time between NOT_SERVING and the first rejected request"
    )
    drain_s: float = Field(20.0, ge=0, description="time for requests in flight on shutdown")
    log_format: Literal["text", "json"] = Field("text", description="format of the log")
    replica_tls: bool = Field(
        False, description="TLS with the system's authorities", json_schema_extra=REPLICAS
    )
    replica_ca: Path | None = Field(
        None,
        description="PEM file of the authority that signed the replicas' certificates",
        json_schema_extra=REPLICAS,
    )
    replica_certificate: Path | None = Field(
        None, description="PEM file to present to replicas", json_schema_extra=REPLICAS
    )
    replica_key: Path | None = Field(
        None, description="PEM file of its key", json_schema_extra=REPLICAS
    )
    replica_server_name: str | None = Field(
        None,
        description="name in the replicas' certificates, if it is not that of their address",
        json_schema_extra=REPLICAS,
    )
    replica_token_file: Path | None = Field(
        None,
        description="file with a token to watch replicas with; callers' tokens are passed on",
        json_schema_extra=REPLICAS,
    )
    retry_timeout_s: float = Field(
        30.0,
        gt=0,
        description="longest time that a request waits for a replica; its deadline counts, too",
        json_schema_extra=LIMITS,
    )
    max_buffered_mb: int = Field(
        512,
        ge=1,
        description="requests held at once, MiB; further ones are rejected",
        json_schema_extra=LIMITS,
    )

    @field_validator("replicas")
    @classmethod
    def _check_replicas(cls, replicas: tuple[str, ...]) -> tuple[str, ...]:
        for replica in replicas:
            host, _, port = replica.removeprefix(DNS).rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) < 65_536:
                raise ValueError(f"expected HOST:PORT or dns:HOST:PORT, got {replica!r}")
        return replicas

    @property
    def credentials(self) -> Credentials:
        """Return the credentials for replicas; raises `ConfigError` if the token cannot be read."""
        token = None
        if self.replica_token_file is not None:
            try:
                token = self.replica_token_file.read_text().strip()
            except OSError as error:
                raise ConfigError(f"replica_token_file: {error}") from error
        return Credentials(
            self.replica_ca,
            self.replica_certificate,
            self.replica_key,
            token,
            self.replica_tls,
            self.replica_server_name,
        )

"""Configuration of a gateway, from a YAML file and command-line options; validated once at load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator
from pydantic.config import JsonDict

from ladderstitch.addresses import split_address
from ladderstitch.errors import ConfigError
from ladderstitch.security.listen_config import LIMITS, ListenConfig

if TYPE_CHECKING:  # the help page appears without grpc
    from ladderstitch.client.channel import Credentials

DNS_PREFIX = "dns:"
"""Prefix of HOST:PORT that stands for every address of the name, resolved every 2 s."""
REPLICAS: JsonDict = {"panel": "Connections to replicas"}


class GatewayConfig(ListenConfig):
    """Settings of one gateway: how callers reach it, and how it reaches the replicas."""

    replicas: tuple[str, ...] = Field(
        (),
        description="HOST:PORT of a replica, repeatable; dns:HOST:PORT stands for every address of "
        "the name, resolved every 2 s",
        json_schema_extra={"flags": ["--replica"]},
    )
    share_port: bool = Field(
        False, description="let several gateways on one machine listen on the same ports"
    )
    drain_announce_s: float = Field(
        0.5, ge=0, description="seconds between NOT_SERVING and the first rejected request"
    )
    drain_s: float = Field(20.0, ge=0, description="seconds for requests in flight on shutdown")
    log_format: Literal["text", "json"] = Field("text", description="format of the log")
    replica_tls: bool = Field(
        False,
        description="connect with TLS and the system's authorities",
        json_schema_extra=REPLICAS,
    )
    replica_ca: Path | None = Field(
        None,
        description="PEM file of the authority that signed the replicas' certificates",
        json_schema_extra=REPLICAS,
    )
    replica_certificate: Path | None = Field(
        None,
        description="PEM file of the certificate that replicas are shown",
        json_schema_extra=REPLICAS,
    )
    replica_key: Path | None = Field(
        None, description="PEM file of the key of replica_certificate", json_schema_extra=REPLICAS
    )
    replica_server_name: str | None = Field(
        None,
        description="name in the replicas' certificates, if it differs from their address",
        json_schema_extra=REPLICAS,
    )
    replica_token_file: Path | None = Field(
        None,
        description="file with the token to watch replicas with; callers' tokens are passed on",
        json_schema_extra=REPLICAS,
    )
    retry_timeout_s: float = Field(
        30.0,
        gt=0,
        description="longest time in seconds to retry a request; its deadline also applies",
        json_schema_extra=LIMITS,
    )
    max_buffered_mb: int = Field(
        512,
        ge=1,
        description="MiB of requests buffered at once; further requests are rejected",
        json_schema_extra=LIMITS,
    )

    @field_validator("replicas")
    @classmethod
    def _check_replicas(cls, replicas: tuple[str, ...]) -> tuple[str, ...]:
        for replica in replicas:
            try:
                _, port = split_address(replica.removeprefix(DNS_PREFIX))
            except ValueError as error:
                if "brackets" in str(error):
                    raise
                port = 0
            if port == 0:
                raise ValueError(f"expected HOST:PORT or dns:HOST:PORT, got {replica[:200]!r}")
        return replicas

    @property
    def credentials(self) -> Credentials:
        """Credentials for connections to replicas.

        Raises `ConfigError` if the token file cannot be read.
        """
        token = None
        if self.replica_token_file is not None:
            try:
                token = self.replica_token_file.read_text().strip()
            except OSError as error:
                raise ConfigError(f"replica_token_file: {error}") from error
        from ladderstitch.client.channel import Credentials

        return Credentials(
            self.replica_ca,
            self.replica_certificate,
            self.replica_key,
            token,
            self.replica_tls,
            self.replica_server_name,
        )

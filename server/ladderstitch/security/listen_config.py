"""The access part of a server's configuration, and what it refuses: a public bind without locks."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ladderstitch.errors import ConfigError

MAX_IMAGE_PIXELS = 50_000_000


class ListenSettings(BaseModel):
    """Where a server listens, who may call it and how much one call may carry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="address to bind; loopback unless asked otherwise")
    port: int = Field(8001, ge=0, le=65_535, description="gRPC; 0 takes a free one")
    metrics_port: int = Field(
        9464, ge=0, le=65_535, description="HTTP port of /metrics; 0 takes a free one"
    )
    admin_port: int | None = Field(
        None, ge=0, le=65_535, description="admin rpcs here and nowhere else; unset: on `port`"
    )
    admin_host: str = Field("127.0.0.1", description="address of the admin port")
    health_port: int | None = Field(
        None, ge=0, le=65_535, description="plaintext grpc.health.v1 alone, for probes; unset: none"
    )
    tls_certificate: Path | None = Field(None, description="PEM chain; reread when it changes")
    tls_key: Path | None = Field(None, description="PEM key of the certificate")
    tls_client_ca: Path | None = Field(
        None, description="PEM; callers must show a certificate signed by it"
    )
    token_file: Path | None = Field(None, description="bearer tokens, their scopes and limits")
    insecure_public: bool = Field(
        False, description="bind beyond loopback although TLS or tokens are missing"
    )
    max_message_mb: int = Field(64, ge=1, le=1024, description="largest gRPC message, MiB")
    max_streams: int = Field(1000, ge=1, le=100_000, description="calls at once on a connection")
    max_connection_age_s: float | None = Field(
        None, gt=0, description="then clients connect anew, and find new replicas; unset: never"
    )
    max_connection_grace_s: float = Field(
        300.0, gt=0, description="for what is in flight on a connection that is too old"
    )

    @model_validator(mode="after")
    def _certificate_and_key_come_together(self) -> ListenSettings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_key: expected it along with tls_certificate")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca: expected tls_certificate and tls_key along with it")
        return self

    @model_validator(mode="after")
    def _public_binds_are_locked(self) -> ListenSettings:
        locked = self.tls_certificate is not None and self.token_file is not None
        if locked or self.insecure_public:
            return self
        admin = [] if self.admin_port is None else [("admin_host", self.admin_host)]
        for field, address in (("host", self.host), *admin):
            if not is_loopback(address):
                raise ValueError(
                    f"{field}: {address} can be reached from outside; expected tls_certificate, "
                    "tls_key and token_file along with it, or insecure_public to do without"
                )
        return self

    def listening(self) -> tuple[tuple[str, str], ...]:
        """Fields of ports, each with the address that it is bound to."""
        return (
            ("port", self.host),
            ("metrics_port", self.host),
            ("admin_port", self.admin_host),
            ("health_port", self.host),
        )

    @classmethod
    def load(cls, path: Path | None, **flags: Any) -> Self:
        """The file's fields, overridden by the flags that are not None.

        Raises `ConfigError` that names the field, what was expected and what came.
        """
        try:
            fields = yaml.safe_load(path.read_text()) or {} if path else {}
            if not isinstance(fields, dict):
                raise ConfigError(f"{path}: expected a mapping of fields")
            return cls.model_validate(fields | {k: v for k, v in flags.items() if v is not None})
        except (OSError, yaml.YAMLError, ValidationError) as error:
            raise ConfigError(f"{path or 'flags'}: {error}") from error


class AccessSettings(ListenSettings):
    """Of a server that computes: its protocols, and how much it takes in, too."""

    http_port: int | None = Field(
        None, ge=0, le=65_535, description="OpenAI's API for language models; unset: none"
    )
    max_image_pixels: int = Field(
        MAX_IMAGE_PIXELS, ge=1, description="of an encoded picture, read off its header"
    )
    max_prompt_tokens: int | None = Field(
        None, ge=1, description="of a text prompt; unset: whatever the context holds"
    )


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach it; names other than `localhost` count as public."""
    try:
        return address == "localhost" or ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return False

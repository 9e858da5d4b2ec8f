"""Configuration of a server's addresses and access; public ones need TLS and tokens."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict

from ladderstitch.addresses import is_loopback
from ladderstitch.errors import ConfigError

ACCESS: JsonDict = {"panel": "Access"}
LIMITS: JsonDict = {"panel": "Limits"}
MAX_IMAGE_PIXELS = 50_000_000
"""Default of the maximum number of pixels of an encoded image."""
MAX_IMAGE_MB = 32
"""Default of the maximum size of the file of an encoded image, MiB."""
IMAGE_DECODERS = 2
"""Default of the number of processes that decode images of one range of costs."""
IMAGE_DECODE_TIMEOUT_S = 10.0
"""Default of the longest time in which one image is decoded."""


class ListenConfig(BaseModel):
    """Configuration that all servers share: addresses, access, and limits of each connection."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    host: str = Field("127.0.0.1", description="address to bind")
    port: int = Field(8001, ge=0, le=65_535, description="gRPC port; 0 picks a free one")
    metrics_port: int = Field(
        9464, ge=0, le=65_535, description="HTTP port of /metrics; 0 picks a free one"
    )
    http_port: int | None = Field(
        None,
        ge=0,
        le=65_535,
        description="HTTP port of the page and of OpenAI's API; unset: none, but a "
        "local `serve` opens 8081 if `port` is unset, too, or `page` is on",
    )
    admin_port: int | None = Field(
        None,
        ge=0,
        le=65_535,
        description="port of the admin rpcs; unset: they are served on `port`",
        json_schema_extra=ACCESS,
    )
    admin_host: str = Field(
        "127.0.0.1", description="address of the admin port", json_schema_extra=ACCESS
    )
    health_port: int | None = Field(
        None,
        ge=0,
        le=65_535,
        description="port of a plaintext grpc.health.v1 service for probes; unset: none",
        json_schema_extra=ACCESS,
    )
    cors_origins: tuple[str, ...] = Field(
        (),
        description="origins of web pages that may call the HTTP port from a browser, such as "
        "https://example.org; * for all; empty: none",
        json_schema_extra={**ACCESS, "flags": ["--cors-origin"]},
    )
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="further names under which the HTTP port may be called, such as "
        "models.example.org; * for all. They matter on loopback without tokens, where web pages "
        "could call it under names of their own",
        json_schema_extra={**ACCESS, "flags": ["--allowed-host"]},
    )
    tls_certificate: Path | None = Field(
        None,
        description="PEM file of the certificate chain, read again when it changes",
        json_schema_extra=ACCESS,
    )
    tls_key: Path | None = Field(
        None, description="PEM file of the certificate's key", json_schema_extra=ACCESS
    )
    tls_client_ca: Path | None = Field(
        None,
        description="PEM file of an authority; callers must present a certificate that it signed",
        json_schema_extra=ACCESS,
    )
    token_file: Path | None = Field(
        None,
        description="YAML file of bearer tokens, their scopes and limits",
        json_schema_extra=ACCESS,
    )
    insecure_public: bool = Field(
        False,
        description="allow an address beyond loopback without TLS or without tokens",
        json_schema_extra=ACCESS,
    )
    max_message_mb: int = Field(
        64,
        ge=1,
        le=1024,
        description="maximum size of a gRPC message, MiB",
        json_schema_extra=LIMITS,
    )
    max_streams: int = Field(
        1000,
        ge=1,
        le=100_000,
        description="maximum number of concurrent calls on one connection",
        json_schema_extra=LIMITS,
    )
    max_connections: int = Field(
        1000,
        ge=4,
        le=100_000,
        description="maximum number of open connections on each port; HTTP closes idle ones for "
        "new ones",
        json_schema_extra=LIMITS,
    )
    max_unfinished_messages: int = Field(
        128,
        ge=1,
        description="maximum number of requests whose message or body is arriving; the oldest "
        "is given up",
        json_schema_extra=LIMITS,
    )
    header_timeout_s: float = Field(
        10.0,
        gt=0,
        description="seconds in which a connection must be set up and the headers must arrive",
        json_schema_extra=LIMITS,
    )
    message_timeout_s: float = Field(
        30.0,
        gt=0,
        description="seconds in which the message or the body of a request must arrive",
        json_schema_extra=LIMITS,
    )
    idle_timeout_s: float = Field(
        300.0,
        ge=1,
        description="seconds without a request after which a connection is closed; more than a "
        "proxy in front keeps its own",
        json_schema_extra=LIMITS,
    )
    min_ping_interval_s: float = Field(
        0.5,
        ge=0,
        description="minimum seconds between keepalive pings of a gRPC client; 0: no minimum",
        json_schema_extra=LIMITS,
    )
    max_connection_age_s: float | None = Field(
        None,
        gt=0,
        description="seconds after which clients must reconnect, which finds new replicas; unset: "
        "never",
        json_schema_extra=LIMITS,
    )
    max_connection_grace_s: float = Field(
        300.0,
        gt=0,
        description="seconds for calls in flight on a connection that has reached its maximum age",
        json_schema_extra=LIMITS,
    )

    @field_validator("cors_origins")
    @classmethod
    def _check_cors_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        """Raise `ValueError` for an origin that is neither `*` nor SCHEME://HOST[:PORT]."""
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ValueError(f"expected * or e.g. https://example.org, got {origin[:80]!r}")
        return origins

    @field_validator("allowed_hosts")
    @classmethod
    def _check_allowed_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        """Raise `ValueError` for a name that is neither `*` nor a name or address alone."""
        for host in hosts:
            if host != "*" and not re.fullmatch(r"[\w.-]+|\[[0-9A-Fa-f:.]+\]", host):
                raise ValueError(
                    f"expected * or a name without a port, e.g. models.example.org, got "
                    f"{host[:80]!r}"
                )
        return hosts

    @model_validator(mode="after")
    def _check_certificate_and_key(self) -> ListenConfig:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError(
                "tls_key: expected tls_certificate and tls_key together, got one of them"
            )
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca: expected tls_certificate and tls_key along with it")
        return self

    @model_validator(mode="after")
    def _check_public_address(self) -> ListenConfig:
        secure = self.tls_certificate is not None and self.token_file is not None
        if secure or self.insecure_public:
            return self
        admin = [] if self.admin_port is None else [("admin_host", self.admin_host)]
        for field, address in (("host", self.host), *admin):
            if not is_loopback(address):
                raise ValueError(
                    f"{field}: expected a loopback address, or tls_certificate, tls_key and "
                    "token_file, or insecure_public; got "
                    f"{address}, which is reachable from other machines"
                )
        return self

    def port_fields(self) -> tuple[tuple[str, str], ...]:
        """Return the names of the port fields, each with the address that it is bound to."""
        return (
            ("port", self.host),
            ("metrics_port", self.host),
            ("http_port", self.host),
            ("admin_port", self.admin_host),
            ("health_port", self.host),
        )

    @classmethod
    def load(cls, path: Path | None, given: Mapping[str, Any] | None = None) -> Self:
        """Return the configuration of a YAML file, overridden by the fields in `given`.

        Nested mappings are merged. Raises `ConfigError` that names the field, the expected value
        and the given one.
        """
        import yaml  # help does without it

        try:
            fields: Any = yaml.safe_load(path.read_text()) or {} if path else {}
            if not isinstance(fields, dict):
                raise ConfigError(
                    f"{path}: expected a mapping of fields, got {type(fields).__name__}"
                )
            return cls.model_validate(_merge(fields, given or {}))
        except ValidationError as error:
            source = f"{path}: " if path else ""
            raise ConfigError(source + _describe_problems(error, cls.model_fields)) from error
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: {error}") from error


def _describe_problems(error: ValidationError, known: Collection[str]) -> str:
    """Return `field: expected X, got Y` for every wrong field; `known` are the model's fields."""
    expected: dict[str, list[str]] = {}
    got: dict[str, object] = {}
    for problem in error.errors(include_url=False):
        # other parts of a place name a member of a union
        parts = [str(part) for part in problem["loc"]]
        field = ".".join(part for part in parts if part.isidentifier() or part.isdigit())
        text = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        if problem["type"] == "extra_forbidden":
            similar = get_close_matches(parts[0], known, 1) if len(parts) == 1 else []
            text = f"a known field{f' such as {similar[0]}' if similar else ''}"
            got[field] = "an unknown one"
        elif problem["type"] != "value_error":
            text = text.partition(", unable to")[0]
            got[field] = repr(problem["input"])
        expected.setdefault(field, []).append(text)
    lines = []
    for field, texts in expected.items():
        found = f"expected {' or '.join(texts)}, got {got[field]}" if field in got else texts[0]
        lines.append(f"{field}: {found}" if field else found)
    return "; ".join(lines)


def _merge(fields: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(fields)
    for name, value in given.items():
        old = merged.get(name)
        nested = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[name] = _merge(old, value) if nested else value  # type: ignore[arg-type]
    return merged

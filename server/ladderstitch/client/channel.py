"""Channels to a server: TLS, token and retry policy of a client."""

from __future__ import annotations

import ipaddress
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from ladderstitch.addresses import is_loopback

RETRIED_SERVICES = (
    "ladderstitch.v1.InferenceService",
    "ladderstitch.v1.GenerationService",
    "inference.GRPCInferenceService",
)
RETRY_POLICY = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{"service": service} for service in RETRIED_SERVICES],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.1s",
                    "backoffMultiplier": 4,
                    "maxBackoff": "5s",
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)
"""The default retry policy: a gRPC service config, in JSON."""

TOKEN = re.compile(rb"[!-~]+")
"""What a bearer token consists of."""
RETRY_BUFFER_BYTES = 64 << 20
"""Maximum size of a request that gRPC keeps for a retry; gRPC's own default is 256 KiB."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """TLS files and token of a client; if all are unset, calls are plaintext and have no token."""

    ca: Path | None = None
    """PEM file of the authority that signed the server's certificate; unset: the system's own."""
    certificate: Path | None = None
    """PEM file of the client's certificate, for mutual TLS."""
    key: Path | None = None
    """PEM file of the key of `certificate`."""
    token: str | None = field(default=None, repr=False)
    """Bearer token."""
    tls: bool = False
    """Whether to use TLS even if neither `ca` nor `certificate` is set."""
    server_name: str | None = None
    """Name in the server's certificate, if it differs from that of the address."""

    @property
    def encrypted(self) -> bool:
        """Whether the connection uses TLS."""
        return self.tls or self.ca is not None or self.certificate is not None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata that carries the token in each call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    @property
    def channel_options(self) -> list[tuple[str, str]]:
        """The options of a gRPC channel that these credentials require."""
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []

    def channel_credentials(self, address: str) -> grpc.ChannelCredentials | None:
        """Return the credentials of a channel to HOST:PORT, or None for plaintext.

        Raises `ValueError` if a token would be sent to another machine in plaintext, or if a
        certificate lacks its key. Raises `OSError` if a file cannot be read.
        """
        if not self.encrypted:
            if self.token and not is_loopback(address.rpartition(":")[0]):
                raise ValueError(
                    f"token: expected ca or tls along with it, got plaintext to {address}"
                )
            return None
        if (self.certificate is None) != (self.key is None):
            raise ValueError("key: expected certificate and key together, got one of them")
        files = (self.ca, self.key, self.certificate)
        contents = [None if file is None else file.read_bytes() for file in files]
        return grpc.ssl_channel_credentials(*contents)


PLAINTEXT = Credentials()


def read_token(path: Path) -> str:
    """Return the bearer token in a file, without the white space around it.

    Raises `OSError` if the file cannot be read and `ValueError` if it holds no token, or text that
    cannot be sent in a header.
    """
    token = path.read_bytes().strip()
    if not TOKEN.fullmatch(token):
        raise ValueError(
            f"token_file: expected one bearer token of printable ASCII characters in {path}, got "
            + ("an empty file" if not token else f"{len(token)} bytes of other text")
        )
    return token.decode()


def open_channel(
    implementation: Any, address: str, credentials: Credentials, retry_policy: str | None
) -> Any:
    """Return a channel to HOST:PORT made by `implementation`, which is `grpc` or `grpc.aio`.

    Raises `ValueError` and `OSError` like `Credentials.channel_credentials`.
    """
    _check_brackets(address)
    channel_credentials = credentials.channel_credentials(address)
    # Outputs that are tensors exceed gRPC's default of 4 MiB; the server limits its answers.
    size = ("grpc.max_receive_message_length", -1)
    options = [size, *retry_options(retry_policy), *credentials.channel_options]
    if channel_credentials is None:
        return implementation.insecure_channel(address, options=options)
    return implementation.secure_channel(address, channel_credentials, options=options)


def _check_brackets(address: str) -> None:
    """Raise `ValueError` for an IPv6 address without brackets: gRPC would not find its port."""
    host, _, port = address.rpartition(":")
    try:
        bare = ipaddress.ip_address(host).version == 6
    except ValueError:
        return  # a name, an IPv4 address, brackets, or a scheme such as unix:
    if bare:
        raise ValueError(f"address: expected [{host}]:{port}, got {address}")


def retry_options(policy: str | None) -> list[tuple[str, str | int]]:
    """Return the channel options of a retry policy; None disables retries."""
    if policy is None:
        return [("grpc.enable_retries", 0)]
    return [
        ("grpc.service_config", policy),
        ("grpc.per_rpc_retry_buffer_size", RETRY_BUFFER_BYTES),
    ]

"""How a caller shows who it is, and checks who the server is."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from ladderstitch.security.listen_config import is_loopback


@dataclass(frozen=True, slots=True)
class Credentials:
    """TLS and token of a client; all unset: plaintext, no token.

    `ca` is the PEM file of the authority that signed the server's certificate (unset with `tls`:
    the system's own), `certificate` and `key` what mutual TLS asks for, `token` a bearer token,
    `server_name` the name in the server's certificate where it is not that of the address.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    token: str | None = field(default=None, repr=False)
    tls: bool = False
    server_name: str | None = None

    @property
    def encrypted(self) -> bool:
        return self.tls or self.ca is not None or self.certificate is not None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    @property
    def options(self) -> list[tuple[str, str]]:
        """Of a channel."""
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []

    def credentials(self, address: str) -> grpc.ChannelCredentials | None:
        """None for plaintext.

        Raises `ValueError` for a token that would travel in the clear to another machine, or for a
        certificate without its key; `OSError` for a file that cannot be read.
        """
        if not self.encrypted:
            if self.token and not is_loopback(address.rpartition(":")[0]):
                raise ValueError(
                    f"token: {address} would get it in the clear; expected ca or tls along with it"
                )
            return None
        if (self.certificate is None) != (self.key is None):
            raise ValueError("key: expected it along with certificate")
        return grpc.ssl_channel_credentials(*map(_bytes, (self.ca, self.key, self.certificate)))


PLAIN = Credentials()


def _bytes(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()


RETRIED = (
    "ladderstitch.v1.InferenceService",
    "ladderstitch.v1.GenerationService",
    "inference.GRPCInferenceService",
)
RETRY_POLICY = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{"service": service} for service in RETRIED],
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
"""A service config: a channel's option `grpc.service_config`."""

BUFFER_BYTES = 64 << 20
"""gRPC keeps a request for another try only up to this size, by default 256 KiB."""


def retry_options(policy: str | None) -> list[tuple[str, str | int]]:
    """Of a channel; None: every failure is the caller's at once."""
    if policy is None:
        return [("grpc.enable_retries", 0)]
    return [("grpc.service_config", policy), ("grpc.per_rpc_retry_buffer_size", BUFFER_BYTES)]

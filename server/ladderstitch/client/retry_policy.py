"""What a client does when a server goes away: gRPC's own retry policy, as every language takes it.

Inference may be asked for twice, so whatever ends with UNAVAILABLE before an answer has begun is
tried anew, for about seven seconds; the deadline always counts. Changes are never repeated.
"""

from __future__ import annotations

import json

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

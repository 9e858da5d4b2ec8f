"""`grpc.health.v1`: the health of a server and of each service and model, whole or watched."""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

from ladderstitch.api.status import Context

MAX_WATCHERS = 1000
"""Maximum number of open `Watch` calls of a server, which need no token."""
SERVING = pb.HealthCheckResponse.SERVING
NOT_SERVING = pb.HealthCheckResponse.NOT_SERVING
UNKNOWN = pb.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc] # it ships no types
    """The servicer.

    `grpc_health` has one, too. It forgets all watchers of a service when one of them leaves, so
    that the others do not hear of later changes (`_async.py` deletes the condition that they
    share; https://github.com/grpc/grpc/pull/43403 proposes a change).
    """

    def __init__(self, max_watchers: int = MAX_WATCHERS) -> None:
        self._statuses: dict[str, pb.HealthCheckResponse.ServingStatus] = {"": SERVING}
        self._max_watchers = max_watchers
        self._watchers: set[asyncio.Event] = set()

    @property
    def num_watchers(self) -> int:
        """The number of open `Watch` calls."""
        return len(self._watchers)

    async def set(self, service: str, status: pb.HealthCheckResponse.ServingStatus) -> None:
        """Set the status of a service, and inform all watchers if it has changed."""
        if self._statuses.get(service) == status:
            return
        self._statuses[service] = status
        for changed in self._watchers:
            changed.set()

    async def Check(
        self, request: pb.HealthCheckRequest, context: Context
    ) -> pb.HealthCheckResponse:
        """Return the status of a service; ends with NOT_FOUND if it is unknown."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"service: expected a known service or model, got {request.service[:100]!r}",
            )
        return pb.HealthCheckResponse(status=status)

    async def Watch(self, request: pb.HealthCheckRequest, context: Context) -> None:
        """Stream the status of a service, at once and whenever it changes."""
        if len(self._watchers) >= self._max_watchers:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"expected at most {self._max_watchers} watchers of health, got one more",
            )
        changed, written = asyncio.Event(), None
        self._watchers.add(changed)
        try:
            while True:
                changed.clear()
                status = self._statuses.get(request.service, UNKNOWN)
                if status != written:
                    await context.write(pb.HealthCheckResponse(status=status))
                    written = status
                await changed.wait()
        finally:
            self._watchers.discard(changed)

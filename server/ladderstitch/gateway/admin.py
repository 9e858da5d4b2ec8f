"""What an administrator may do to all replicas at once, and to the gateway itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from ladderstitch.api.status import Context, abort, statuses
from ladderstitch.api.validation import announce_seconds
from ladderstitch.errors import NotReady
from ladderstitch.gateway.replica_pool import ReplicaPool
from ladderstitch.gateway.upstream_call import OURS
from ladderstitch.v1 import admin_pb2 as pb

ADMIN = "/ladderstitch.v1.AdminService/"
OIP = "/inference.GRPCInferenceService/"
EVERYWHERE = frozenset(
    {
        f"{ADMIN}GetScheduling",
        f"{ADMIN}UpdateScheduling",
        f"{ADMIN}LoadModel",
        f"{ADMIN}UnloadModel",
        f"{OIP}RepositoryModelLoad",
        f"{OIP}RepositoryModelUnload",
    }
)
DRAIN = f"{ADMIN}Drain"


class GatewayAdmin(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc ships no types
    """Changes go to every replica that serves; `Drain` is the gateway's own."""

    def __init__(self, fleet: ReplicaPool, drain: Callable[[float], Awaitable[bool]]) -> None:
        self._fleet, self._drain = fleet, drain

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        method = details.method
        if method == DRAIN:
            return grpc.unary_unary_rpc_method_handler(
                self.drain,
                request_deserializer=pb.DrainRequest.FromString,
                response_serializer=pb.DrainResponse.SerializeToString,
            )
        if method not in EVERYWHERE:
            return None

        async def call(request: bytes, context: Context) -> bytes:
            return await self._everywhere(method, request, context)

        return grpc.unary_unary_rpc_method_handler(call)

    @statuses
    async def drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        """Take this gateway out of service; its replicas go on."""
        finished = await self._drain(announce_seconds(request.announce))
        return pb.DrainResponse(finished=finished)

    async def _everywhere(self, method: str, request: bytes, context: Context) -> bytes:
        """The last replica's answer if all agreed, else the first one's status that did not."""
        metadata = tuple((k, v) for k, v in context.invocation_metadata() if k not in OURS)
        calls: list[Any] = [
            link.stub("unary_unary", method)(
                request, timeout=context.time_remaining(), metadata=metadata
            )
            for link in self._fleet.serving
        ]
        if not calls:
            await abort(context, NotReady("no replica serves; try again later"))
        await asyncio.gather(*calls, return_exceptions=True)  # all end, whatever the first does
        try:
            replies: list[bytes] = [await call for call in calls]
        except grpc.aio.AioRpcError as error:
            trailing = tuple(error.trailing_metadata() or ())
            await context.abort(error.code(), error.details() or "", trailing)
        return replies[-1]

"""Admin rpcs of a gateway: changes go to all replicas, `Drain` to the gateway itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from ladderstitch.api.deadlines import announce_seconds
from ladderstitch.api.status import Context, abort, abort_with, translate_errors
from ladderstitch.errors import NotReady
from ladderstitch.gateway.replica_pool import ReplicaPool
from ladderstitch.gateway.upstream_call import HOP_METADATA
from ladderstitch.v1 import admin_pb2 as pb

ADMIN = "/ladderstitch.v1.AdminService/"
OIP = "/inference.GRPCInferenceService/"
BROADCAST_METHODS = frozenset(
    {
        f"{ADMIN}GetScheduling",
        f"{ADMIN}UpdateScheduling",
        f"{ADMIN}LoadModel",
        f"{ADMIN}UnloadModel",
        f"{OIP}RepositoryModelLoad",
        f"{OIP}RepositoryModelUnload",
    }
)
"""Methods that are forwarded to every serving replica."""
DRAIN = f"{ADMIN}Drain"


class GatewayAdmin(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc ships no types
    """The handler of admin rpcs; `drain` drains the gateway and returns whether it became idle."""

    def __init__(self, pool: ReplicaPool, drain: Callable[[float], Awaitable[bool]]) -> None:
        self._pool, self._drain = pool, drain

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Return the handler of a method; None if it is no admin rpc."""
        method = details.method
        if method == DRAIN:
            return grpc.unary_unary_rpc_method_handler(
                self.drain,
                request_deserializer=pb.DrainRequest.FromString,
                response_serializer=pb.DrainResponse.SerializeToString,
            )
        if method not in BROADCAST_METHODS:
            return None

        async def call(request: bytes, context: Context) -> bytes:
            return await self._broadcast(method, request, context)

        return grpc.unary_unary_rpc_method_handler(call)

    @translate_errors
    async def drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        """Drain this gateway; its replicas keep serving."""
        finished = await self._drain(announce_seconds(request.announce))
        return pb.DrainResponse(finished=finished)

    async def _broadcast(self, method: str, request: bytes, context: Context) -> bytes:
        """Call every serving replica; return the last response.

        If a replica fails, the call ends with the status of the first one that failed. Every
        replica's call is awaited either way.
        """
        metadata = tuple((k, v) for k, v in context.invocation_metadata() if k not in HOP_METADATA)
        calls: list[Any] = [
            replica.stub("unary_unary", method)(
                request, timeout=context.time_remaining(), metadata=metadata
            )
            for replica in self._pool.serving
        ]
        if not calls:
            await abort(context, NotReady("no replica serves; try again later"))
        await asyncio.gather(*calls, return_exceptions=True)
        try:
            replies: list[bytes] = [await call for call in calls]
        except grpc.aio.AioRpcError as error:
            trailing = tuple(error.trailing_metadata() or ())
            await abort_with(context, error.code(), error.details() or "", trailing)
        return replies[-1]

"""Questions of the Open Inference Protocol that a gateway answers from all of its replicas.

`ModelStatistics` has the sums over the replicas, so that counts only grow whichever replica
answered, and `RepositoryIndex` has the models of all of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from google.protobuf.message import Message

from ladderstitch.api.status import Context, abort, abort_with
from ladderstitch.errors import NotReady
from ladderstitch.gateway.replica_pool import ReplicaPool
from ladderstitch.gateway.upstream_call import HOP_METADATA
from ladderstitch.oip import grpc_service_pb2 as pb

OIP = "/inference.GRPCInferenceService/"
READY = "READY"


def merge_statistics(replies: Sequence[bytes]) -> pb.ModelStatisticsResponse:
    """Return the sums of the statistics of each model and version."""
    sums: dict[tuple[str, str], pb.ModelStatistics] = {}
    for reply in replies:
        for found in pb.ModelStatisticsResponse.FromString(reply).model_stats:
            key = found.name, found.version
            if key in sums:
                _add_statistics(sums[key], found)
            else:
                sums[key] = found
    return pb.ModelStatisticsResponse(model_stats=[sums[key] for key in sorted(sums)])


def _add_statistics(total: pb.ModelStatistics, more: pb.ModelStatistics) -> None:
    total.last_inference = max(total.last_inference, more.last_inference)
    total.inference_count += more.inference_count
    total.execution_count += more.execution_count
    _add_durations(total.inference_stats, more.inference_stats)
    batches = {batch.batch_size: batch for batch in total.batch_stats}
    for batch in more.batch_stats:
        if batch.batch_size in batches:
            _add_durations(batches[batch.batch_size], batch)
        else:
            total.batch_stats.append(batch)
    total.batch_stats.sort(key=lambda batch: batch.batch_size)


def _add_durations(total: Message, more: Message) -> None:
    """Add the counts and nanoseconds of all durations of a message to those of another one."""
    for field, value in more.ListFields():
        if isinstance(value, pb.StatisticDuration):
            duration = getattr(total, field.name)
            duration.count += value.count
            duration.ns += value.ns


def merge_index(replies: Sequence[bytes]) -> pb.RepositoryIndexResponse:
    """Return every model and version once; it is ready if it is so on one replica."""
    found: dict[tuple[str, str], pb.RepositoryIndexResponse.ModelIndex] = {}
    for reply in replies:
        for model in pb.RepositoryIndexResponse.FromString(reply).models:
            key = model.name, model.version
            if key not in found or model.state == READY:
                found[key] = model
    return pb.RepositoryIndexResponse(models=[found[key] for key in sorted(found)])


MERGED_METHODS: dict[str, Callable[[Sequence[bytes]], Message]] = {
    f"{OIP}ModelStatistics": merge_statistics,
    f"{OIP}RepositoryIndex": merge_index,
}


class MergedQueries(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc ships no types
    """The handler of `MERGED_METHODS`."""

    def __init__(self, pool: ReplicaPool) -> None:
        self._pool = pool

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Return the handler of a method; None if it is another one."""
        method = details.method
        if method not in MERGED_METHODS:
            return None

        async def call(request: bytes, context: Context) -> bytes:
            return await self._ask_all(method, request, context)

        return grpc.unary_unary_rpc_method_handler(call)

    async def _ask_all(self, method: str, request: bytes, context: Context) -> bytes:
        """Return the merged answers of the serving replicas.

        A replica that fails, e.g. because it does not have the model, is left out. If all fail, the
        call ends with the status of the first one.
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
        ends = await asyncio.gather(*calls, return_exceptions=True)
        replies = [end for end in ends if isinstance(end, bytes)]
        if not replies:
            error = next(end for end in ends if isinstance(end, grpc.aio.AioRpcError))
            trailing = tuple(error.trailing_metadata() or ())
            await abort_with(context, error.code(), error.details() or "", trailing)
        return MERGED_METHODS[method](replies).SerializeToString()

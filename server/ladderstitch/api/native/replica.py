"""`ladderstitch.v1.ReplicaService`: reports to gateways how soon this replica could answer."""

from __future__ import annotations

import asyncio
import functools
import operator
import time

import ladderstitch
from ladderstitch.api.status import Context
from ladderstitch.hosting.registry import ModelRegistry
from ladderstitch.scheduling.load_report import HORIZONS_S, IDLE, PUSH_S
from ladderstitch.v1 import replica_pb2 as pb
from ladderstitch.v1 import replica_pb2_grpc

POLL_INTERVAL_S = 0.02
"""Seconds between looks at the load while it does not change."""
HEARTBEAT_S = 0.5
"""Maximum seconds between reports; several missing reports mean that the replica is stuck."""
WAIT_STEP_US = 100
"""Resolution of reported waits in microseconds, so that a running clock alone is no change."""


class ReplicaService(replica_pb2_grpc.ReplicaServiceServicer):
    """The servicer."""

    def __init__(self, registry: ModelRegistry) -> None:
        self.registry = registry

    async def WatchLoad(  # type: ignore[override] # grpc.aio takes coroutines that write, too
        self, request: pb.WatchLoadRequest, context: Context
    ) -> None:
        """Stream load reports, at each change and every 0.5 s, until the caller cancels."""
        reported, reported_at = None, 0.0
        while True:
            report, now = build_load_response(self.registry), time.monotonic()
            if report != reported or now - reported_at >= HEARTBEAT_S:
                await context.write(report)
                reported, reported_at = report, now
            await asyncio.sleep(PUSH_S if reported_at == now else POLL_INTERVAL_S)


def build_load_response(registry: ModelRegistry) -> pb.WatchLoadResponse:
    """Return the replica's current state and load, summed over its models."""
    models = registry.models_by_name
    reports = (model.scheduler.load_report() for model in models.values())
    total = functools.reduce(operator.add, reports, IDLE)
    return pb.WatchLoadResponse(
        replica=registry.replica,
        version=ladderstitch.__version__,
        serving=registry.serving,
        models=models,
        metrics_port=registry.metrics_port,
        http_port=registry.http_port,
        waits=[
            pb.Wait(due_us=round(1e6 * due_s), wait_us=_round_microseconds(wait_s))
            for due_s, wait_s in zip(HORIZONS_S, total.waits_s, strict=True)
        ],
        request_us=_round_microseconds(total.request_s),
        batch_us=_round_microseconds(total.batch_s),
    )


def _round_microseconds(seconds: float) -> int:
    return WAIT_STEP_US * round(1e6 * seconds / WAIT_STEP_US)

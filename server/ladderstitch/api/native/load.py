"""`ladderstitch.v1.ReplicaService`: tells gateways how soon this replica could answer."""

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

QUIET_S = 0.02
"""How often it is looked whether there is news, while there is none."""
HEARTBEAT_S = 0.5
"""Silence for several of these means that the replica is stuck."""
GRAIN_US = 100
"""Waits are told in such steps, so that a clock that ticks is no news."""


class ReplicaService(replica_pb2_grpc.ReplicaServiceServicer):
    def __init__(self, registry: ModelRegistry) -> None:
        self.registry = registry

    async def WatchLoad(  # type: ignore[override] # grpc.aio takes coroutines that write, too
        self, request: pb.WatchLoadRequest, context: Context
    ) -> None:
        told, told_at = None, 0.0
        while True:
            state, now = load_of(self.registry), time.monotonic()
            if state != told or now - told_at >= HEARTBEAT_S:
                await context.write(state)
                told, told_at = state, now
            await asyncio.sleep(PUSH_S if told_at == now else QUIET_S)


def load_of(registry: ModelRegistry) -> pb.WatchLoadResponse:
    """The replica's state at present."""
    everything = registry.models_by_name
    reports = (model.scheduler.load_report() for model in everything.values())
    report = functools.reduce(operator.add, reports, IDLE)
    return pb.WatchLoadResponse(
        replica=registry.replica,
        version=ladderstitch.__version__,
        serving=registry.serving,
        models=everything,
        metrics_port=registry.metrics_port,
        waits=[
            pb.Wait(due_us=round(1e6 * due_s), wait_us=_grained(wait_s))
            for due_s, wait_s in zip(HORIZONS_S, report.waits_s, strict=True)
        ],
        request_us=_grained(report.request_s),
        batch_us=_grained(report.batch_s),
    )


def _grained(seconds: float) -> int:
    return GRAIN_US * round(1e6 * seconds / GRAIN_US)

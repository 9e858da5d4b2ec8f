"""A client that balances over the replicas registered on Ray, for `verify_operations.py`."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass, field
from typing import Any

import grpc
from fake_nodes import node_count

METHOD = "/ladderstitch.v1.InferenceService/Infer"
EVENT_TIMEOUT_S = 600.0
"""Longest wait for an answer, a replica or a node, generous for slow machines."""
ATTEMPTS = 8
"""Attempts per request."""


@dataclass(frozen=True)
class Size:
    """Number of replicas and nodes at an instant of `time.perf_counter`."""

    at: float
    replicas: int
    nodes: int


@dataclass
class BalancingClient:
    """A client that balances requests over the registered replicas round-robin."""

    control: Any
    addresses: list[str] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)
    retries: int = 0
    turn: Any = field(default_factory=itertools.count)

    async def refresh(self) -> None:
        """Read the registered replicas and the number of nodes."""
        registered = await self.control.get_replicas.remote()
        self.addresses = sorted(registered.values())
        nodes = await asyncio.to_thread(node_count)
        self.sizes.append(Size(time.perf_counter(), len(self.addresses), nodes))
        self.changed.set()

    async def follow(self) -> None:
        """Refresh every 0.1 s until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(0.1)

    async def call(self, message: bytes) -> bytes:
        """Return the answer of a replica; retry on another one while they are UNAVAILABLE."""
        for attempt in range(ATTEMPTS):
            try:
                answer: bytes = await self._channel()(message, timeout=EVENT_TIMEOUT_S)
                return answer
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE or attempt == ATTEMPTS - 1:
                    raise
                self.retries += 1
                await asyncio.sleep(0.02 * 2**attempt)
        raise AssertionError("the last attempt raises")

    async def wait_for_size(self, replicas: int, nodes: int | None = None) -> None:
        """Wait for a number of replicas, and of nodes if given; raises `TimeoutError`."""
        async with asyncio.timeout(EVENT_TIMEOUT_S):
            while len(self.addresses) != replicas or nodes not in (None, self.sizes[-1].nodes):
                self.changed.clear()
                await self.changed.wait()

    async def close(self) -> None:
        """Close all channels."""
        for channel in self.channels.values():
            await channel.close()

    def _channel(self) -> Any:
        address = self.addresses[next(self.turn) % len(self.addresses)]
        if address not in self.channels:
            self.channels[address] = grpc.aio.insecure_channel(address)
        return self.channels[address].unary_unary(METHOD)

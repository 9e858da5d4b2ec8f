"""The replicas of a gateway: how they are discovered, and which one gets the next request."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence

from ladderstitch.addresses import join_address, split_address
from ladderstitch.client.channel import Credentials
from ladderstitch.gateway.config import DNS_PREFIX
from ladderstitch.gateway.replica_connection import ReplicaConnection
from ladderstitch.gateway.routing import pick_replica

log = logging.getLogger(__name__)

DNS_REFRESH_S = 2.0

Discovery = AsyncIterator[frozenset[str]]
"""Yields all addresses (HOST:PORT): first the current ones, then again after each change."""


class ReplicaPool:
    """The connections to all replicas; create it inside a running event loop.

    `on_change` is called when the state of a replica changes.
    """

    def __init__(
        self,
        credentials: Credentials,
        max_message_bytes: int,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.replicas: dict[str, ReplicaConnection] = {}
        """Connections by address."""
        self._credentials, self._max_message_bytes = credentials, max_message_bytes
        self._on_change, self._clock = on_change, clock
        self._turns = itertools.count()
        self._change = asyncio.Event()
        self._retiring: set[asyncio.Task[None]] = set()

    @property
    def serving(self) -> list[ReplicaConnection]:
        """Replicas that accept requests."""
        return [replica for replica in self.replicas.values() if replica.serving]

    async def follow(self, discovery: Discovery) -> None:
        """Apply every set of addresses until the discovery ends, if it ends."""
        async for addresses in discovery:
            self.set_addresses(addresses)

    def set_addresses(self, addresses: Collection[str]) -> None:
        """Connect to new addresses; replicas at other addresses finish their calls and close.

        Raises `ValueError` and `OSError` as `Credentials.channel_credentials` does.
        """
        for address in addresses - self.replicas.keys():
            replica = ReplicaConnection(
                address, self._credentials, self._notify, self._max_message_bytes, self._clock
            )
            self.replicas[address] = replica
            replica.start()
        for address in self.replicas.keys() - set(addresses):
            task = asyncio.create_task(self._retire(self.replicas.pop(address)))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
        self._notify()

    def pick(
        self, budget_s: float, excluded: Collection[ReplicaConnection]
    ) -> ReplicaConnection | None:
        """Return the serving replica with the most slack; None if all are excluded.

        Ejected replicas are picked only if no other is left.
        """
        now = self._clock()
        left = [replica for replica in self.serving if replica not in excluded]
        if len(left) > 1:
            left = [replica for replica in left if not replica.is_ejected(now)] or left
        if not left:
            return None
        loads = [replica.load for replica in left]
        return left[pick_replica(loads, budget_s, now, next(self._turns))]

    async def wait_for_change(self, timeout_s: float) -> None:
        """Wait until the state of a replica changes, or until the time is up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._change.wait()

    async def close(self) -> None:
        """Close all connections at once."""
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        await asyncio.gather(*(replica.close() for replica in self.replicas.values()))

    def _notify(self) -> None:
        self._change.set()
        self._change = asyncio.Event()
        self._on_change()

    async def _retire(self, replica: ReplicaConnection) -> None:
        replica.retired = True
        try:
            await replica.idle.wait()
        finally:
            await replica.close()


async def discover_replicas(replicas: Sequence[str]) -> Discovery:
    """Yield `HOST:PORT` as it is, and the addresses of `dns:HOST:PORT`, resolved every 2 s.

    A failed look-up keeps the addresses that are known.
    """
    fixed = frozenset(replica for replica in replicas if not replica.startswith(DNS_PREFIX))
    names = [
        replica.removeprefix(DNS_PREFIX) for replica in replicas if replica.startswith(DNS_PREFIX)
    ]
    resolved: dict[str, frozenset[str]] = dict.fromkeys(names, frozenset())
    yielded: frozenset[str] | None = None
    while True:
        for name in names:
            resolved[name] = await _resolve(name, resolved[name])
        addresses = fixed.union(*resolved.values())
        if addresses != yielded:
            yielded = addresses
            yield addresses
        if not names:
            return
        await asyncio.sleep(DNS_REFRESH_S)


async def _resolve(name: str, known: frozenset[str]) -> frozenset[str]:
    host, port = split_address(name)
    loop = asyncio.get_running_loop()
    try:
        entries = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if known:
            log.warning("%s: %s; keeping %d known replicas", name, error.strerror, len(known))
        return known
    return frozenset(join_address(*sockaddr[:2]) for *_, sockaddr in entries)

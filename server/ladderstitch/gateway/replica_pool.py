"""All replicas of a gateway: those that come and go, and which of them gets the next request."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Any

from ladderstitch.client.channel import Credentials
from ladderstitch.gateway.config import DNS
from ladderstitch.gateway.replica_connection import ReplicaConnection
from ladderstitch.gateway.routing import choose


class ReplicaPool:
    """Made inside a running event loop; `changed` is called when a replica's state does."""

    def __init__(
        self,
        access: Credentials,
        max_message_bytes: int,
        changed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.links: dict[str, ReplicaConnection] = {}
        self._access, self._max_message_bytes = access, max_message_bytes
        self._told, self._clock = changed, clock
        self._turn = itertools.count()
        self._change = asyncio.Event()
        self._leaving: set[asyncio.Task[None]] = set()

    @property
    def serving(self) -> list[ReplicaConnection]:
        return [link for link in self.links.values() if link.serving]

    async def follow(self, discovery: Discovery) -> None:
        """Until the discovery ends, if it ever does."""
        async for addresses in discovery:
            self.update(addresses)

    def update(self, addresses: Collection[str]) -> None:
        """From now on these are the replicas; others finish what they have.

        Raises `ValueError` and `OSError` as `Credentials.credentials` does.
        """
        for address in addresses - self.links.keys():
            link = ReplicaConnection(
                address, self._access, self._notify, self._max_message_bytes, self._clock
            )
            self.links[address] = link
            link.start()
        for address in self.links.keys() - set(addresses):
            task = asyncio.create_task(self._retire(self.links.pop(address)))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)
        self._notify()

    def choose(
        self, budget_s: float, without: Collection[ReplicaConnection]
    ) -> ReplicaConnection | None:
        """The replica with the most slack; those that rest only if there is no other."""
        now = self._clock()
        well = [link for link in self.links.values() if link.serving and link not in without]
        if len(well) > 1:
            well = [link for link in well if not link.resting(now)] or well
        if not well:
            return None
        views = [link.view for link in well]
        return well[choose(views, budget_s, now, next(self._turn))]

    async def change(self, within_s: float) -> None:
        """Return when a replica's state has changed, or after so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._change.wait()

    async def close(self) -> None:
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in self.links.values()))

    def _notify(self) -> None:
        self._change.set()
        self._change = asyncio.Event()
        self._told()

    async def _retire(self, link: ReplicaConnection) -> None:
        link.retired = True
        try:
            await link.idle.wait()
        finally:
            await link.close()


log = logging.getLogger(__name__)

LOOK_UP_S = 2.0

Discovery = AsyncIterator[frozenset[str]]
"""All addresses (HOST:PORT), at once and whenever they have changed."""


async def named(replicas: Sequence[str]) -> Discovery:
    """`HOST:PORT` as it is, `dns:HOST:PORT` looked up every two seconds; errors change nothing."""
    fixed = frozenset(replica for replica in replicas if not replica.startswith(DNS))
    names = [replica.removeprefix(DNS) for replica in replicas if replica.startswith(DNS)]
    found: dict[str, frozenset[str]] = dict.fromkeys(names, frozenset())
    told: frozenset[str] | None = None
    while True:
        for name in names:
            found[name] = await _look_up(name, found[name])
        addresses = fixed.union(*found.values())
        if addresses != told:
            told = addresses
            yield addresses
        if not names:
            return
        await asyncio.sleep(LOOK_UP_S)


async def _look_up(name: str, before: frozenset[str]) -> frozenset[str]:
    host, _, port = name.rpartition(":")
    loop = asyncio.get_running_loop()
    try:
        entries = await loop.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if before:
            log.warning("%s: %s; the %d known replicas stay", name, error.strerror, len(before))
        return before
    return frozenset(_address(family, sockaddr) for family, *_, sockaddr in entries)


def _address(family: int, sockaddr: tuple[Any, ...]) -> str:
    host, port = sockaddr[:2]
    return f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"

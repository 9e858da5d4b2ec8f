"""All replicas of a gateway: those that come and go, and which of them gets the next request."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Collection

from ladderstitch.client.credentials import Access
from ladderstitch.gateway.discovery import Discovery
from ladderstitch.gateway.replica_connection import Link
from ladderstitch.gateway.routing import choose


class Fleet:
    """Made inside a running event loop; `changed` is called when a replica's state does."""

    def __init__(
        self,
        access: Access,
        max_message_bytes: int,
        changed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.links: dict[str, Link] = {}
        self._access, self._max_message_bytes = access, max_message_bytes
        self._told, self._clock = changed, clock
        self._turn = itertools.count()
        self._change = asyncio.Event()
        self._leaving: set[asyncio.Task[None]] = set()

    @property
    def serving(self) -> list[Link]:
        return [link for link in self.links.values() if link.serving]

    async def follow(self, discovery: Discovery) -> None:
        """Until the discovery ends, if it ever does."""
        async for addresses in discovery:
            self.update(addresses)

    def update(self, addresses: Collection[str]) -> None:
        """From now on these are the replicas; others finish what they have.

        Raises `ValueError` and `OSError` as `Access.credentials` does.
        """
        for address in addresses - self.links.keys():
            link = Link(address, self._access, self._notify, self._max_message_bytes, self._clock)
            self.links[address] = link
            link.start()
        for address in self.links.keys() - set(addresses):
            task = asyncio.create_task(self._retire(self.links.pop(address)))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)
        self._notify()

    def choose(self, budget_s: float, without: Collection[Link]) -> Link | None:
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

    async def _retire(self, link: Link) -> None:
        link.retired = True
        try:
            await link.idle.wait()
        finally:
            await link.close()

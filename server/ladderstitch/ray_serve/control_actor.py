"""What all replicas and gateways of a deployment on Ray share: settings, addresses, a secret."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import ray

from ladderstitch.scheduling.settings import ActiveSettings, SchedulerSettings

NAMESPACE = "ladderstitch"
LONG_POLL_S = 30.0
LEASE_S = 2 * LONG_POLL_S + 5
"""A replica asks for settings again and again; one that has not for so long is dead."""
PAGE_LEASE_S = 15.0
"""Gateways say every five seconds where their metrics are."""
RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Lease:
    """Where a replica answers or a gateway's metrics are, and when it was last heard of."""

    address: str
    heard_at: float


class ControlActor:
    """The scheduling in force, and who answers; for those born later, too.

    A named actor. The last writer wins, be it an administrator or a new `user_config`; a
    `user_config` that was seen before (Serve repeats it to every new replica) is no new writing.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.live = ActiveSettings(0, SchedulerSettings.model_validate(settings))
        self.seen_config: str | None = None
        self.replicas: dict[str, Lease] = {}
        self.pages: dict[str, Lease] = {}
        self.watch_token = secrets.token_hex(32)
        self.changed = asyncio.Condition()

    async def get(self) -> ActiveSettings:
        return self.live

    async def update(self, changes: dict[str, Any]) -> ActiveSettings:
        """Change some fields for everyone; raises pydantic's `ValidationError` for a bad value."""
        self.live = self.live.with_changes(changes)
        await self._notify()
        return self.live

    async def configured(self, user_config: dict[str, Any]) -> ActiveSettings:
        """Take a `user_config` over as a change, if it is a new one."""
        text = json.dumps(user_config, sort_keys=True)
        if text == self.seen_config:
            return self.live
        self.seen_config = text
        return await self.update(user_config)

    async def newer_than(self, revision: int, replica: str, address: str) -> ActiveSettings:
        """Wait for a later revision, or for the long poll to end; that a replica asks keeps it
        registered, also with an actor that was started anew."""
        await self.register(replica, address)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LONG_POLL_S), self.changed:
                await self.changed.wait_for(lambda: self.live.revision > revision)
        return self.live

    async def register(self, replica: str, address: str) -> None:
        """Where a replica answers."""
        news = replica not in self.replicas
        self.replicas[replica] = Lease(address, time.monotonic())
        if news:
            await self._notify()

    async def unregister(self, replica: str) -> None:
        """It takes no more requests."""
        if self.replicas.pop(replica, None) is not None:
            await self._notify()

    async def registered(self) -> dict[str, str]:
        """Address by replica."""
        oldest = time.monotonic() - LEASE_S
        self.replicas = {name: r for name, r in self.replicas.items() if r.heard_at > oldest}
        return {name: replica.address for name, replica in self.replicas.items()}

    async def addresses_other_than(self, known: frozenset[str]) -> frozenset[str]:
        """Wait until the replicas' addresses are others, or for the long poll to end."""
        await self.registered()  # forgets the dead
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LONG_POLL_S), self.changed:
                await self.changed.wait_for(lambda: self._addresses() != known)
        return self._addresses()

    async def other_pages(self, gateway: str, page: str) -> frozenset[str]:
        """Where a gateway's metrics are, and where those of all others are."""
        now = time.monotonic()
        self.pages[gateway] = Lease(page, now)
        return frozenset(
            other.address
            for name, other in self.pages.items()
            if name != gateway and other.heard_at > now - PAGE_LEASE_S
        )

    async def token(self) -> str:
        """With which gateways watch replicas that ask for tokens."""
        return self.watch_token

    def _addresses(self) -> frozenset[str]:
        return frozenset(replica.address for replica in self.replicas.values())

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()


def live_control(settings: SchedulerSettings) -> Any:
    """The deployment's `ControlActor` actor, started if there is none."""
    actor = ray.remote(ControlActor).options(
        name="live-control",
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=1000,
    )
    return actor.remote(settings.model_dump())


async def registered_replicas(control: Any) -> AsyncIterator[frozenset[str]]:
    """A gateway's discovery: addresses whenever they change; without an answer they stay."""
    known: frozenset[str] = frozenset()
    while True:
        try:
            found = await control.addresses_other_than.remote(known)
        except ray.exceptions.RayError:
            await asyncio.sleep(RETRY_S)
            continue
        if found and found != known:  # an actor that was started anew knows nobody yet
            known = found
            yield known

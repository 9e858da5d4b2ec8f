"""State that all replicas and gateways of a Ray deployment share: settings, addresses, a token."""

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
"""A replica renews its lease with every long poll; it is removed when the lease expires."""
METRICS_LEASE_S = 15.0
"""Lease of a gateway's metrics endpoint, which gateways renew every 5 s."""
RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Lease:
    """A registered HOST:PORT, and when it was last renewed (`time.monotonic`)."""

    address: str
    renewed_at: float


class ControlActor:
    """Named actor that holds the active settings and the registry of replicas.

    The last write wins, whether an administrator or a new `user_config` makes it. A `user_config`
    that equals the previous one is ignored: Serve repeats it to every new replica.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.active = ActiveSettings(0, SchedulerSettings.model_validate(settings))
        self.last_user_config: str | None = None
        self.replicas: dict[str, Lease] = {}
        self.metrics_endpoints: dict[str, Lease] = {}
        self.watch_token = secrets.token_hex(32)
        self.changed = asyncio.Condition()

    async def get_settings(self) -> ActiveSettings:
        """Return the active settings with their revision."""
        return self.active

    async def update_settings(self, changes: dict[str, Any]) -> ActiveSettings:
        """Change some fields for all replicas; return the active settings.

        A change that a gateway sends to all replicas arrives once from each of them, and only the
        first one makes a revision. Raises pydantic's `ValidationError` for an invalid value.
        """
        before, self.active = self.active, self.active.with_changes(changes)
        if self.active.revision != before.revision:
            await self._notify()
        return self.active

    async def apply_user_config(self, user_config: dict[str, Any]) -> ActiveSettings:
        """Apply a `user_config` as a change unless it equals the previous one."""
        text = json.dumps(user_config, sort_keys=True)
        if text == self.last_user_config:
            return self.active
        self.last_user_config = text
        return await self.update_settings(user_config)

    async def wait_for_revision(self, revision: int, replica: str, address: str) -> ActiveSettings:
        """Wait for a revision above `revision`, or until the long poll ends.

        The call renews the replica's lease, also with an actor that has been restarted.
        """
        await self.register(replica, address)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LONG_POLL_S), self.changed:
                await self.changed.wait_for(lambda: self.active.revision > revision)
        return self.active

    async def register(self, replica: str, address: str) -> None:
        """Add a replica at HOST:PORT, or renew its lease."""
        is_new = replica not in self.replicas
        self.replicas[replica] = Lease(address, time.monotonic())
        if is_new:
            await self._notify()

    async def unregister(self, replica: str) -> None:
        """Remove a replica, which takes no more requests."""
        if self.replicas.pop(replica, None) is not None:
            await self._notify()

    async def get_replicas(self) -> dict[str, str]:
        """Return HOST:PORT by replica; replicas whose lease has expired are removed."""
        oldest = time.monotonic() - LEASE_S
        self.replicas = {name: r for name, r in self.replicas.items() if r.renewed_at > oldest}
        return {name: replica.address for name, replica in self.replicas.items()}

    async def wait_for_addresses(self, known: frozenset[str]) -> frozenset[str]:
        """Wait until the replicas' addresses differ from `known`, or until the long poll ends."""
        await self.get_replicas()  # removes the expired ones
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LONG_POLL_S), self.changed:
                await self.changed.wait_for(lambda: self._addresses() != known)
        return self._addresses()

    async def exchange_metrics_endpoints(self, gateway: str, endpoint: str) -> frozenset[str]:
        """Store HOST:PORT of a gateway's metrics; return those of all other gateways."""
        now = time.monotonic()
        self.metrics_endpoints[gateway] = Lease(endpoint, now)
        return frozenset(
            other.address
            for name, other in self.metrics_endpoints.items()
            if name != gateway and other.renewed_at > now - METRICS_LEASE_S
        )

    async def get_watch_token(self) -> str:
        """Return the token with which gateways watch replicas that require tokens."""
        return self.watch_token

    def _addresses(self) -> frozenset[str]:
        return frozenset(replica.address for replica in self.replicas.values())

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()


def control_actor(settings: SchedulerSettings) -> Any:
    """Return the handle of the deployment's `ControlActor`; start the actor if none exists."""
    actor = ray.remote(ControlActor).options(
        name="control",
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=1000,
        # Otherwise it would be in the placement group of the replica that starts it, and end with
        # that replica: the group's resources would be gone, so that it could never start again.
        scheduling_strategy="DEFAULT",
    )
    return actor.remote(settings.model_dump())


async def discover_registered_replicas(control: Any) -> AsyncIterator[frozenset[str]]:
    """Yield the replicas' addresses whenever they change: a gateway's discovery.

    While the actor does not answer, the known addresses stay.
    """
    known: frozenset[str] = frozenset()
    while True:
        try:
            found = await control.wait_for_addresses.remote(known)
        except ray.exceptions.RayError:
            await asyncio.sleep(RETRY_S)
            continue
        if found and found != known:  # a restarted actor has no replicas yet
            known = found
            yield known

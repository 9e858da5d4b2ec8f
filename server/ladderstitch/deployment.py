"""Ray Serve's part: it places, watches, restarts and reconfigures replicas. The only user of Ray.

No request passes through Ray: every replica answers on its own gRPC port.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from ladderstitch.config import ServerConfig
from ladderstitch.engine.placement import resolve_device
from ladderstitch.hosting import LiveSettings
from ladderstitch.language.bundle import is_language_bundle
from ladderstitch.logs import configure as configure_logs
from ladderstitch.pressure import Pressure
from ladderstitch.rank_actors import RANK_RESOURCES, launch_actor
from ladderstitch.replica import Replica, merged
from ladderstitch.scheduling.settings import SchedulerSettings

log = logging.getLogger(__name__)

APP = "ladderstitch"
NAMESPACE = "ladderstitch"
LONG_POLL_S = 30.0


class LiveControl:
    """The scheduling in force, for all replicas of a deployment, also those born later.

    A named actor. The last writer wins, be it an administrator or a new `user_config`; a
    `user_config` that was seen before (Serve repeats it to every new replica) is no new writing.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.live = LiveSettings(0, SchedulerSettings.model_validate(settings))
        self.seen_config: str | None = None
        self.addresses: dict[str, str] = {}
        self.changed = asyncio.Condition()

    async def get(self) -> LiveSettings:
        return self.live

    async def update(self, changes: dict[str, Any]) -> LiveSettings:
        """Change some fields for everyone; raises pydantic's `ValidationError` for a bad value."""
        self.live = merged(self.live, changes)
        async with self.changed:
            self.changed.notify_all()
        return self.live

    async def configured(self, user_config: dict[str, Any]) -> LiveSettings:
        """Take a `user_config` over as a change, if it is a new one."""
        text = json.dumps(user_config, sort_keys=True)
        if text == self.seen_config:
            return self.live
        self.seen_config = text
        return await self.update(user_config)

    async def newer_than(self, revision: int) -> LiveSettings:
        """Wait for a later revision, or for the long poll to end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LONG_POLL_S), self.changed:
                await self.changed.wait_for(lambda: self.live.revision > revision)
        return self.live

    async def register(self, replica: str, address: str) -> None:
        """Where a replica answers; gateways will ask."""
        self.addresses[replica] = address

    async def unregister(self, replica: str) -> None:
        """It takes no more requests."""
        self.addresses.pop(replica, None)

    async def registered(self) -> dict[str, str]:
        return dict(self.addresses)


def live_control(settings: SchedulerSettings) -> Any:
    """The deployment's `LiveControl` actor, started if there is none."""
    actor = ray.remote(LiveControl).options(
        name="live-control",
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=1000,
    )
    return actor.remote(settings.model_dump())


class ReplicaDeployment:
    """What Serve runs: a `Replica` that follows `LiveControl`."""

    async def __init__(  # type: ignore[misc] # Serve awaits asynchronous constructors
        self, fields: dict[str, Any]
    ) -> None:
        self.config = ServerConfig.model_validate(fields)
        configure_logs(self.config.log_format)
        self.control = live_control(self.config.scheduling)
        self.replica = Replica(
            self.config,
            name=serve.get_replica_context().replica_id.unique_id,
            update=self._update,
            share_port=True,
            launcher=launch_actor,
        )
        await self.replica.start()
        self.pressure = Pressure(self.replica.host, self.replica.metrics)
        self.replica.apply(await self.control.get.remote())
        address = f"{self.config.host}:{self.replica.port}"
        await self.control.register.remote(self.replica.host.replica, address)
        self._following = asyncio.create_task(self._follow(), name="follow-live-settings")

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls this with the deployment's `user_config`: fields of `SchedulerSettings`."""
        self.replica.apply(await self.control.configured.remote(user_config))

    async def check_health(self) -> None:
        """Raises while the dispatch loop is dead, so that Serve replaces the replica."""
        if not self.replica.alive:
            raise RayServeException("the dispatch loop has ended")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `SlackPolicy` decides by; Serve's own count does not see our requests."""
        return self.pressure.sample().stats()

    async def ports(self) -> tuple[int, int]:
        """gRPC and metrics."""
        return self.replica.port, self.replica.metrics_port

    async def __del__(self) -> None:
        """Serve awaits this when it stops a replica: finish what was accepted."""
        self._following.cancel()
        await self.control.unregister.remote(self.replica.host.replica)
        await self.replica.stop()

    async def _update(self, changes: dict[str, Any]) -> LiveSettings:
        live: LiveSettings = await self.control.update.remote(changes)
        self.replica.apply(live)
        return live

    async def _follow(self) -> None:
        """Apply what others change; survives a restart of the control actor."""
        while True:
            try:
                revision = self.replica.host.live.revision
                self.replica.apply(await self.control.newer_than.remote(revision))
            except ray.exceptions.RayError as error:
                log.warning("live settings unreachable, trying again: %s", error)
                await asyncio.sleep(1.0)


def build(args: dict[str, Any]) -> Any:
    """For Serve config files: `import_path: ladderstitch.deployment:build`.

    `args` are fields of `ServerConfig`; the deployment `replica` takes a `user_config` with fields
    of `SchedulerSettings`.
    """
    return application(ServerConfig.load(None, **args))


def application(config: ServerConfig) -> Any:
    """The deployment graph of one model: a replica, and its ranks in one placement group."""
    gpus = int(resolve_device(config.device) != "cpu")
    options: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus}
    placement: dict[str, Any] = {}
    if is_language_bundle(config.bundle):
        options["num_gpus"] = 0  # its ranks compute, not the replica
        rank = RANK_RESOURCES | ({"GPU": 1} if gpus else {})
        placement = {
            "placement_group_bundles": [{"CPU": 1}] + [rank] * (config.ranks + config.spare_ranks),
            # ranks that share memory are on one machine; those with an address need not be
            "placement_group_strategy": "PACK" if config.rank_address else "STRICT_PACK",
        }
    deployment: Any = serve.deployment(
        ReplicaDeployment,
        name="replica",
        num_replicas=1,
        max_ongoing_requests=1000,
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=config.drain_s + 5,
        ray_actor_options=options,
        max_surge_percent=100,
        **placement,
    )
    return deployment.bind(config.model_dump(mode="json"))

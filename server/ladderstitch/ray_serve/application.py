"""Ray Serve's part: it places, watches, restarts and reconfigures replicas. The only user of Ray.

No request passes through Ray: every replica answers on its own gRPC port.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ladderstitch.bundles import is_language_bundle
from ladderstitch.config import ServerConfig
from ladderstitch.gateway.config import GatewayConfig
from ladderstitch.ray_serve.control_actor import live_control
from ladderstitch.ray_serve.gateway_deployment import gateways
from ladderstitch.replica.load_sampler import LoadSampler
from ladderstitch.replica.replica import Replica
from ladderstitch.runtime.device import resolve_device
from ladderstitch.runtime.process import settle_for_good
from ladderstitch.scheduling.settings import ActiveSettings
from ladderstitch.telemetry.logs import configure as configure_logs
from ladderstitch.text.engine.rank import run
from ladderstitch.text.engine.rank_handle import RankProcess

log = logging.getLogger(__name__)

APP = "ladderstitch"


class ReplicaDeployment:
    """What Serve runs: a `Replica` that follows `ControlActor`."""

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
            watch_token=await self.control.token.remote(),
        )
        await self.replica.start()
        settle_for_good()
        self.pressure = LoadSampler(self.replica.registry, self.replica.metrics)
        self.replica.apply(await self.control.get.remote())
        self.address = f"{_reachable(self.config.host)}:{self.replica.port}"
        await self.control.register.remote(self.replica.registry.replica, self.address)
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
        await self.control.unregister.remote(self.replica.registry.replica)
        await self.replica.stop()

    async def _update(self, changes: dict[str, Any]) -> ActiveSettings:
        live: ActiveSettings = await self.control.update.remote(changes)
        self.replica.apply(live)
        return live

    async def _follow(self) -> None:
        """Apply what others change; survives a restart of the control actor."""
        while True:
            try:
                host = self.replica.registry
                live = await self.control.newer_than.remote(
                    host.active_settings.revision, host.replica, self.address
                )
                self.replica.apply(live)
            except ray.exceptions.RayError as error:
                log.warning("live settings unreachable, trying again: %s", error)
                await asyncio.sleep(1.0)


def build(args: dict[str, Any]) -> Any:
    """For Serve config files: `import_path: ladderstitch.ray_serve.application:build`.

    `args` are fields of `ServerConfig`; the deployment `replica` takes a `user_config` with fields
    of `SchedulerSettings`.
    """
    return application(ServerConfig.load(None, args))


def application(config: ServerConfig) -> Any:
    """The deployment graph of one model: a replica and its ranks in one placement group; if
    several are asked for, gateways before them."""
    if config.replicas == 1:
        return _replicas(config)
    in_front = gateways(gateway_settings(config), config.scheduling, config.gateways)
    return in_front(_replicas(behind_gateways(config)))


def gateway_settings(config: ServerConfig) -> GatewayConfig:
    """Gateways listen where a single replica would."""
    shared = GatewayConfig.model_fields.keys() & ServerConfig.model_fields.keys() - {"replicas"}
    fields = config.model_dump(include=shared)
    return GatewayConfig.model_validate(fields | {"share_port": config.gateways > 1})


def behind_gateways(config: ServerConfig) -> ServerConfig:
    """Replicas of one machine: free ports of loopback, plaintext there, but the same tokens."""
    return config.model_copy(
        update={
            "host": "127.0.0.1",
            "port": 0,
            "metrics_port": 0,
            "admin_port": None,
            "health_port": None,
            "tls_certificate": None,
            "tls_key": None,
            "tls_client_ca": None,
            "max_connection_age_s": None,
        }
    )


def _replicas(config: ServerConfig) -> Any:
    gpus = int(resolve_device(config.device) != "cpu")
    options: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus}
    placement: dict[str, Any] = {}
    if is_language_bundle(config.bundle):
        options["num_gpus"] = 0  # its ranks compute, not the replica
        rank = RANK_RESOURCES | ({"GPU": 1} if gpus else {})
        placement = {
            "placement_group_bundles": [{"CPU": 1}]
            + [rank] * (config.tensor_parallel_size + config.spare_ranks),
            # ranks that share memory are on one machine; those with an address need not be
            "placement_group_strategy": "PACK" if config.rank_address else "STRICT_PACK",
        }
    deployment: Any = serve.deployment(
        ReplicaDeployment,
        name="replica",
        num_replicas=config.replicas,
        max_ongoing_requests=1000,
        health_check_period_s=1,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=config.drain_s + 5,
        ray_actor_options=options,
        max_surge_percent=100,
        **placement,
    )
    return deployment.bind(config.model_dump(mode="json"))


def _reachable(host: str) -> str:
    """The address under which other machines know one that is bound."""
    everywhere = host in ("0.0.0.0", "::", "[::]")
    return str(ray.util.get_node_ip_address()) if everywhere else host


RANK_RESOURCES = {"CPU": 1.0}


class RankActor:
    """Is a rank for as long as its group lives."""

    def run(self, address: str, secret: str) -> None:
        run(address, secret)


class _Actor:
    def __init__(self, actor: Any, running: Any) -> None:
        self.actor, self.running = actor, running

    async def wait(self) -> object:
        with contextlib.suppress(RayError):  # killed, by us or not: it has ended
            await self.running
        return None

    def kill(self) -> None:
        ray.kill(self.actor)


async def launch_actor(address: str, secret: str) -> RankProcess:
    """A `Launcher`: one more rank in the current placement group."""
    group: Any = get_current_placement_group()
    gpus = max((bundle.get("GPU", 0) for bundle in group.bundle_specs), default=0)
    actor: Any = (
        ray.remote(RankActor)
        .options(
            num_cpus=RANK_RESOURCES["CPU"],
            num_gpus=gpus,
            max_restarts=0,  # the group asks for a new one itself
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=group),
        )
        .remote()
    )
    return _Actor(actor, actor.run.remote(address, secret))

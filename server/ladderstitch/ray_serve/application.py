"""Ray Serve application: Serve places, watches, restarts and reconfigures replicas.

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

from ladderstitch.addresses import join_address
from ladderstitch.bundles import is_language_bundle
from ladderstitch.config import ServerConfig
from ladderstitch.gateway.config import GatewayConfig
from ladderstitch.ray_serve.control_actor import control_actor
from ladderstitch.ray_serve.gateway_deployment import put_gateways_before
from ladderstitch.ray_serve.local_cluster import keep_serve_on_loopback
from ladderstitch.replica.load_sampler import LoadSampler
from ladderstitch.replica.replica import Replica
from ladderstitch.runtime.device import resolve_device
from ladderstitch.runtime.process import freeze_gc
from ladderstitch.scheduling.settings import ActiveSettings
from ladderstitch.telemetry.logs import configure as configure_logs
from ladderstitch.text.engine.rank import run
from ladderstitch.text.engine.rank_handle import RankProcess, huge_pages

log = logging.getLogger(__name__)

APP = "ladderstitch"
RETRY_S = 1.0
"""Pause before the control actor is called again after a failure."""
RANK_RESOURCES = {"CPU": 1.0}


def build(args: dict[str, Any]) -> Any:
    """Return the application for Serve config files.

    A file states `import_path: ladderstitch.ray_serve.application:build`. `args` are fields of
    `ServerConfig`; the deployment `replica` takes a `user_config` with fields of
    `SchedulerSettings`.
    """
    config = ServerConfig.load(None, args)
    return application(config.with_default_http() if config.page == "on" else config)


def application(config: ServerConfig) -> Any:
    """Return the deployment graph of one model.

    Each replica shares a placement group with its ranks. If the configuration asks for several
    replicas, gateways are put in front of them.
    """
    if config.replicas == 1:
        return _replica_deployment(config)
    replicas = _replica_deployment(loopback_config(config))
    return put_gateways_before(replicas, gateway_config(config), config.scheduling, config.gateways)


def gateway_config(config: ServerConfig) -> GatewayConfig:
    """Return the configuration of gateways that listen where a single replica would.

    Even a single one shares its port: with the sockets that reserve it, and with its successor.
    """
    shared = GatewayConfig.model_fields.keys() & ServerConfig.model_fields.keys() - {"replicas"}
    fields = config.model_dump(include=shared)
    return GatewayConfig.model_validate(fields | {"share_port": True})


def loopback_config(config: ServerConfig) -> ServerConfig:
    """Return the configuration of replicas behind gateways on the same machine.

    They listen on free ports of loopback, without TLS but with the same tokens.
    """
    return config.model_copy(
        update={
            "host": "127.0.0.1",
            "port": 0,
            "metrics_port": 0,
            "http_port": None if config.http_port is None else 0,
            "page": "on" if config.serves_page else "off",
            "admin_port": None,
            "health_port": None,
            "tls_certificate": None,
            "tls_key": None,
            "tls_client_ca": None,
            "max_connection_age_s": None,
        }
    )


def _replica_deployment(config: ServerConfig) -> Any:
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


class ReplicaDeployment:
    """The Serve deployment around one `Replica`, which follows the settings of `ControlActor`."""

    async def __init__(  # type: ignore[misc] # Serve awaits asynchronous constructors
        self, fields: dict[str, Any]
    ) -> None:
        self._following: asyncio.Task[None] | None = None
        self.config = ServerConfig.model_validate(fields)
        configure_logs(self.config.log_format)
        keep_serve_on_loopback()
        self.control = control_actor(self.config.scheduling)
        self.replica = Replica(
            self.config,
            name=serve.get_replica_context().replica_id.unique_id,
            update=self._update_settings,
            share_port=True,
            launcher=launch_actor,
            watch_token=await self.control.get_watch_token.remote(),
        )
        await self.replica.start()
        freeze_gc()
        self.load_sampler = LoadSampler(self.replica.registry, self.replica.metrics)
        self.replica.apply_settings(await self.control.get_settings.remote())
        self.address = join_address(advertised_host(self.config.host), self.replica.port)
        await self.control.register.remote(self.replica.registry.replica, self.address)
        self._following = asyncio.create_task(self._follow_settings(), name="follow-settings")

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply the deployment's `user_config`: fields of `SchedulerSettings`. Serve calls this."""
        self.replica.apply_settings(await self.control.apply_user_config.remote(user_config))

    async def check_health(self) -> None:
        """Raise an error if the dispatch loop has ended, so that Serve replaces the replica."""
        if not self.replica.alive:
            raise RayServeException("the dispatch loop has ended")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the load sample for `SlackPolicy`; Serve itself does not see the requests."""
        return self.load_sampler.sample().to_stats()

    async def ports(self) -> tuple[int, int]:
        """Return the gRPC port and the metrics port."""
        return self.replica.port, self.replica.metrics_port

    async def __del__(self) -> None:
        """Finish the accepted requests. Serve awaits this when it stops a replica.

        A replica whose start failed has none, and its process ends now.
        """
        if self._following is None:
            return
        self._following.cancel()
        await self.control.unregister.remote(self.replica.registry.replica)
        await self.replica.stop()

    async def _update_settings(self, changes: dict[str, Any]) -> ActiveSettings:
        settings: ActiveSettings = await self.control.update_settings.remote(changes)
        self.replica.apply_settings(settings)
        return settings

    async def _follow_settings(self) -> None:
        """Apply every new revision; keep trying while the control actor restarts."""
        registry = self.replica.registry
        while True:
            try:
                settings = await self.control.wait_for_revision.remote(
                    registry.active_settings.revision, registry.replica, self.address
                )
                self.replica.apply_settings(settings)
            except ray.exceptions.RayError as error:
                log.warning("the control actor does not answer, retrying: %s", error)
                await asyncio.sleep(RETRY_S)


def advertised_host(host: str) -> str:
    """Return the address under which other machines reach a server that is bound to `host`."""
    any_address = host in ("0.0.0.0", "::", "[::]")
    return str(ray.util.get_node_ip_address()) if any_address else host


class RankActor:
    """Ray actor that runs one rank until its group closes the connection."""

    def run(self, address: str, secret: str) -> None:
        """Run the rank; `address` and `secret` are those of its group."""
        run(address, secret)


class _RankActorProcess:
    """A `RankProcess` that is a Ray actor."""

    def __init__(self, actor: Any, running: Any) -> None:
        self.actor, self.running = actor, running

    async def wait(self) -> object:
        with contextlib.suppress(RayError):  # the actor was killed, so it has ended
            await self.running
        return None

    def kill(self) -> None:
        ray.kill(self.actor)


async def launch_actor(address: str, secret: str) -> RankProcess:
    """Start one more rank in the current placement group: a `Launcher`."""
    group: Any = get_current_placement_group()
    gpus = max((bundle.get("GPU", 0) for bundle in group.bundle_specs), default=0)
    actor: Any = (
        ray.remote(RankActor)
        .options(
            num_cpus=RANK_RESOURCES["CPU"],
            num_gpus=gpus,
            max_restarts=0,  # the rank group requests a new one itself
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=group),
            runtime_env={"env_vars": huge_pages()},
        )
        .remote()
    )
    return _RankActorProcess(actor, actor.run.remote(address, secret))

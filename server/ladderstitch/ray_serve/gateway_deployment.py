"""Gateways as a Ray Serve deployment: Serve starts and watches them; they share one port."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from ladderstitch.addresses import join_address
from ladderstitch.gateway.config import GatewayConfig
from ladderstitch.gateway.gateway import Gateway
from ladderstitch.ray_serve.control_actor import control_actor, discover_registered_replicas
from ladderstitch.ray_serve.local_cluster import keep_serve_on_loopback
from ladderstitch.runtime.process import freeze_gc, tune_malloc
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.telemetry.logs import configure as configure_logs

EXCHANGE_PERIOD_S = 5.0
"""How often gateways exchange their metrics endpoints."""


def put_gateways_before(
    replicas: Any, config: GatewayConfig, scheduling: SchedulerSettings, count: int
) -> Any:
    """Return an application with `count` gateways in front of the replicas' application."""
    deployment: Any = serve.deployment(
        GatewayDeployment,
        name="gateway",
        num_replicas=count,
        max_ongoing_requests=1000,
        health_check_period_s=1,
        health_check_timeout_s=5,
        graceful_shutdown_timeout_s=config.drain_announce_s + config.drain_s + 5,
        ray_actor_options={"num_cpus": 0},
    )
    return deployment.bind(config.model_dump(mode="json"), scheduling.model_dump(), replicas)


class GatewayDeployment:
    """The Serve deployment around one `Gateway` in front of all registered replicas."""

    async def __init__(  # type: ignore[misc] # Serve awaits asynchronous constructors
        self, fields: dict[str, Any], scheduling: dict[str, Any], replicas: Any
    ) -> None:
        """Start the gateway; the handle `replicas` makes them part of the application."""
        config = GatewayConfig.model_validate(fields)
        tune_malloc()
        configure_logs(config.log_format)
        keep_serve_on_loopback()
        control = control_actor(SchedulerSettings.model_validate(scheduling))
        discovery = discover_registered_replicas(control)
        token: str = await control.get_watch_token.remote()
        self.replicas = replicas
        self.gateway = Gateway(config, discovery, watch_token=token)
        await self.gateway.start()
        freeze_gc()
        self.name = serve.get_replica_context().replica_id.unique_id
        self._exchanging = asyncio.create_task(
            self._exchange_metrics_endpoints(control), name="metrics-endpoints"
        )

    async def check_health(self) -> None:
        """Raise an error if the gateway no longer follows its replicas; Serve replaces it then."""
        if not self.gateway.alive:
            raise RayServeException("the gateway no longer follows its replicas")

    async def ports(self) -> tuple[int, int]:
        """Return the gRPC and metrics ports that some gateway always has, once one can answer."""
        await self.gateway.wait_until_serving()
        gateway = self.gateway
        return gateway.port, gateway.config.metrics_port or gateway.metrics_port

    async def __del__(self) -> None:
        """Finish the calls in flight. Serve awaits this when it stops a gateway."""
        self._exchanging.cancel()
        await self.gateway.stop()

    async def _exchange_metrics_endpoints(self, control: Any) -> None:
        """Share this gateway's endpoint, so that Prometheus learns of all gateways from any one."""
        while True:
            endpoint = join_address(self.gateway.config.host, self.gateway.metrics_port)
            with contextlib.suppress(ray.exceptions.RayError):
                others = await control.exchange_metrics_endpoints.remote(self.name, endpoint)
                self.gateway.metrics.other_endpoints = others
            await asyncio.sleep(EXCHANGE_PERIOD_S)

"""Gateways under Ray Serve, which starts and watches them; they share one port of the machine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from ladderstitch.gateway.config import GatewayConfig
from ladderstitch.gateway.gateway import Gateway
from ladderstitch.ray_serve.control_actor import live_control, registered_replicas
from ladderstitch.runtime.process import return_freed_memory, settle_for_good
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.telemetry.logs import configure as configure_logs

PAGE_S = 5.0
"""How often gateways tell each other where their metrics are."""


class GatewayDeployment:
    """What Serve runs: a `Gateway` before all replicas that are registered."""

    async def __init__(  # type: ignore[misc] # Serve awaits asynchronous constructors
        self, fields: dict[str, Any], scheduling: dict[str, Any], replicas: Any
    ) -> None:
        """`replicas` is their deployment's handle: it makes them part of the application."""
        settings = GatewayConfig.model_validate(fields)
        return_freed_memory()
        configure_logs(settings.log_format)
        control = live_control(SchedulerSettings.model_validate(scheduling))
        discovery = registered_replicas(control)
        token: str = await control.token.remote()
        self.replicas = replicas
        self.gateway = Gateway(settings, discovery, watch_token=token)
        await self.gateway.start()
        settle_for_good()
        self.name = serve.get_replica_context().replica_id.unique_id
        self._telling = asyncio.create_task(self._exchange_pages(control), name="pages")

    async def _exchange_pages(self, control: Any) -> None:
        """Prometheus asks one gateway for the pages of all."""
        while True:
            page = f"{self.gateway.settings.host}:{self.gateway.metrics_port}"
            with contextlib.suppress(ray.exceptions.RayError):
                others = await control.other_pages.remote(self.name, page)
                self.gateway.metrics.other_pages = others
            await asyncio.sleep(PAGE_S)

    async def check_health(self) -> None:
        """Raises when the gateway no longer follows its replicas, so that Serve replaces it."""
        if not self.gateway.alive:
            raise RayServeException("the gateway no longer follows its replicas")

    async def ports(self) -> tuple[int, int]:
        """gRPC and metrics, once requests are answered: those that some gateway always has."""
        await self.gateway.until_serving()
        settings, gateway = self.gateway.settings, self.gateway
        return gateway.port, settings.metrics_port or gateway.metrics_port

    async def __del__(self) -> None:
        """Serve awaits this when it stops a gateway: finish what is under way."""
        self._telling.cancel()
        await self.gateway.stop()


def gateways(
    settings: GatewayConfig, scheduling: SchedulerSettings, count: int
) -> Callable[[Any], Any]:
    """Makes an application of the replicas' one, by placing so many gateways before it."""
    deployment: Any = serve.deployment(
        GatewayDeployment,
        name="gateway",
        num_replicas=count,
        max_ongoing_requests=1000,
        health_check_period_s=1,
        health_check_timeout_s=5,
        graceful_shutdown_timeout_s=settings.drain_announce_s + settings.drain_s + 5,
        ray_actor_options={"num_cpus": 0},
    )

    def bind(replicas: Any) -> Any:
        return deployment.bind(settings.model_dump(mode="json"), scheduling.model_dump(), replicas)

    return bind

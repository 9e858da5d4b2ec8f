"""The gateway itself: its servers, its health, and its going down without losing a request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection_pb2

from ladderstitch.api.listener import ListenerConfig, bind
from ladderstitch.gateway.admin import EVERYWHERE, GatewayAdmin
from ladderstitch.gateway.config import GatewayConfig
from ladderstitch.gateway.forwarder import Forwarder, path_of
from ladderstitch.gateway.metrics import GatewayMetrics
from ladderstitch.gateway.replica_pool import Discovery, ReplicaPool
from ladderstitch.oip import grpc_service_pb2
from ladderstitch.v1 import generation_pb2, inference_pb2

SERVICES: tuple[ServiceDescriptor, ...] = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"],
    grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
    reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
)
METHODS = tuple(
    method for s in SERVICES for method in s.methods if path_of(method) not in EVERYWHERE
)
INHERIT_S = 1.0
LAME_DUCK_S = 0.25
"""So long before the end, newcomers are told DRAINING; gRPC would cancel them."""
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Gateway:
    """Made inside a running event loop; comes up with `start`, goes down with `stop`."""

    def __init__(
        self, settings: GatewayConfig, discovery: Discovery, watch_token: str | None = None
    ) -> None:
        """`watch_token` goes to replicas instead of the one of the settings.

        Raises `ConfigError` for certificates or tokens that cannot be used.
        """
        self.settings = settings
        self.port = self.metrics_port = 0
        self.leaving = False
        self._news = asyncio.Event()
        access = settings.credentials
        if watch_token is not None:
            access = replace(access, token=watch_token)
        self.fleet = ReplicaPool(access, settings.max_message_mb << 20, self._news.set)
        self.metrics = GatewayMetrics(lambda: self.fleet.links.values())
        self._transport = ListenerConfig.of(
            settings, self.metrics.denied, share_port=settings.share_port
        )
        self._forwarder = Forwarder(METHODS, self.fleet, self.metrics, settings)
        self._health = HealthServicer()
        self._known: set[str] = {"", *(service.full_name for service in SERVICES)}
        self._servers = self._make_servers()
        self._discovery = discovery
        self._tasks: list[asyncio.Task[None]] = []
        self._close_metrics: Callable[[], None] = lambda: None

    def _make_servers(self) -> list[tuple[grpc.aio.Server, tuple[str, int], bool]]:
        """Server, address and whether it is encrypted: for callers, administrators, probes."""
        transport, administrator = self._transport, GatewayAdmin(self.fleet, self.drain)
        main = transport.server()
        servers = [(main, (self.settings.host, self.settings.port), True)]
        admin = main
        if transport.admin is not None:
            admin = transport.server()
            servers.append((admin, transport.admin, True))
        if transport.health is not None:  # kubelets send no token and speak no TLS
            probes = grpc.aio.server(options=transport.options())
            servers.append((probes, transport.health, False))
        admin.add_generic_rpc_handlers((administrator,))
        main.add_generic_rpc_handlers((self._forwarder,))
        for server, *_ in servers:
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        return servers

    @property
    def serving(self) -> bool:
        """Whether requests that come now are answered."""
        return not self.leaving and bool(self.fleet.serving)

    @property
    def alive(self) -> bool:
        """False if what keeps it up to date has failed."""
        return not any(task.done() and task.exception() is not None for task in self._tasks)

    async def start(self) -> None:
        """Listen and look for replicas; raises `OSError` if a port is taken."""
        for server, address, encrypted in self._servers:
            bound = bind(server, address, self._transport.credentials if encrypted else None)
            self.port = self.port or bound
        self._expose_metrics()
        await self._tell_health()
        for server, *_ in self._servers:
            await server.start()
        self._tasks = [
            asyncio.create_task(self.fleet.follow(self._discovery), name="discovery"),
            asyncio.create_task(self._follow_health(), name="health"),
            asyncio.create_task(self._take_metrics_port(), name="metrics-port"),
        ]

    def _expose_metrics(self) -> None:
        """Pages of its own for every gateway: one that finds the port taken takes a free one."""
        port, host = self.settings.metrics_port, self.settings.host
        try:
            self.metrics_port, self._close_metrics = self.metrics.expose(port, host)
        except OSError:
            if not self.settings.share_port:
                raise
            self.metrics_port, self._close_metrics = self.metrics.expose(0, host)

    async def _take_metrics_port(self) -> None:
        """Inherit it from a gateway that ends, so that Prometheus always finds one there."""
        port, host = self.settings.metrics_port, self.settings.host
        while port not in (0, self.metrics_port):
            await asyncio.sleep(INHERIT_S)
            with contextlib.suppress(OSError):
                closing, found = self._close_metrics, self.metrics.expose(port, host)
                self.metrics_port, self._close_metrics = found
                await asyncio.to_thread(closing)

    async def until_serving(self) -> None:
        """Return when a replica serves."""
        while not self.fleet.serving:
            await self.fleet.change(1.0)

    async def drain(self, announce_s: float) -> bool:
        """Unready at once, refusing what is new after a while; whether the rest ended in time."""
        self.leaving = True
        await self._tell_health()
        await asyncio.sleep(announce_s)
        self._forwarder.draining = True
        return await self._forwarder.idle(self.settings.drain_s)

    async def stop(self) -> None:
        """Drain, then exit."""
        self.leaving = True
        await self._tell_health()
        if not self._forwarder.draining:
            await asyncio.sleep(self.settings.drain_announce_s)
        self._forwarder.draining = True
        await asyncio.sleep(LAME_DUCK_S)
        await asyncio.gather(*(server.stop(self.settings.drain_s) for server, *_ in self._servers))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.fleet.close()
        self._close_metrics()

    async def _follow_health(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            await self._tell_health()

    async def _tell_health(self) -> None:
        """A service or model is as healthy as the best replica that has it."""
        models = {model for link in self.fleet.serving for model in link.models}
        services = {"", *(service.full_name for service in SERVICES)}
        self._known |= models
        for name in self._known:
            well = self.serving and (name in services or name in models)
            await self._health.set(name, SERVING if well else NOT_SERVING)

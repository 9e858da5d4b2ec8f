"""A gateway: its servers, its health, and how it shuts down without losing a request."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2_grpc

from ladderstitch.api.health import NOT_SERVING, SERVING, HealthService
from ladderstitch.api.listener import ListenerConfig, bind, name_port, reserve, start_servers
from ladderstitch.api.reflection import REFLECTION_SERVICES
from ladderstitch.errors import ConfigError
from ladderstitch.gateway.admin import BROADCAST_METHODS, GatewayAdmin
from ladderstitch.gateway.buffered_requests import BufferedRequests
from ladderstitch.gateway.config import GatewayConfig
from ladderstitch.gateway.forwarder import Forwarder, method_path
from ladderstitch.gateway.merged_queries import MERGED_METHODS, MergedQueries
from ladderstitch.gateway.metrics import GatewayMetrics
from ladderstitch.gateway.replica_pool import Discovery, ReplicaPool
from ladderstitch.oip import grpc_service_pb2
from ladderstitch.runtime.process import release_ports
from ladderstitch.telemetry.metrics_server import Probes
from ladderstitch.v1 import generation_pb2, inference_pb2

if TYPE_CHECKING:  # most gateways start without them
    from ladderstitch.api.http_server import HttpServer
    from ladderstitch.gateway.http_forwarder import HttpForwarder
    from ladderstitch.gateway.replica_client import ReplicaClient

SERVICES: tuple[ServiceDescriptor, ...] = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"],
    grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
    *REFLECTION_SERVICES,
)
SERVICE_NAMES = frozenset({"", *(service.full_name for service in SERVICES)})
"""Names of the health protocol that stand for the gateway as a whole."""
FORWARDED_METHODS = tuple(
    method
    for service in SERVICES
    for method in service.methods
    if method_path(method) not in BROADCAST_METHODS | MERGED_METHODS.keys()
)
PORT_TAKEOVER_POLL_S = 1.0
"""How often a gateway tries to bind the configured metrics port while another one holds it."""
DRAIN_GRACE_S = 0.25
"""Time in which new calls are rejected with DRAINING before the servers stop.

gRPC would cancel them without a status that clients can retry.
"""


class Gateway:
    """The servers of one gateway, from `start` to `stop`; create it inside a running event loop.

    Raises `ConfigError` for certificates or tokens that cannot be used.
    """

    def __init__(
        self, config: GatewayConfig, discovery: Discovery, watch_token: str | None = None
    ) -> None:
        """Create the servers; `watch_token` replaces the configured token for replicas."""
        self.config = config
        self.port = self.metrics_port = 0
        self.drain_announced = False
        """Whether health reports NOT_SERVING because the gateway drains or stops."""
        self._state_changed = asyncio.Event()
        credentials = config.credentials
        if watch_token is not None:
            credentials = replace(credentials, token=watch_token)
        self.pool = ReplicaPool(
            credentials, config.max_message_mb << 20, on_change=self._state_changed.set
        )
        self.metrics = GatewayMetrics(lambda: tuple(self.pool.replicas.values()))
        self._probes = Probes(self._why_not_alive, self._why_not_serving)
        self._listener = ListenerConfig.from_config(
            config, self.metrics.observe_denial, share_port=config.share_port
        )
        self._buffered = BufferedRequests(config.max_buffered_mb)
        self.metrics.buffered_bytes.set_function(lambda: self._buffered.num_bytes)
        self._forwarder = Forwarder(
            FORWARDED_METHODS, self.pool, self.metrics, self._buffered, config.retry_timeout_s
        )
        self._health = HealthService()
        self._health_names = set(SERVICE_NAMES)
        self._servers = self._make_servers()
        self._discovery = discovery
        self.http, self._http_forwarder, self._http_client = self._make_http()
        self._tasks: list[asyncio.Task[None]] = []
        self._close_metrics: Callable[[], None] = lambda: None
        self._reserved: list[socket.socket] = []

    def _make_servers(self) -> list[tuple[grpc.aio.Server, tuple[str, int], bool]]:
        """Create the servers for callers, administrators and probes.

        Returns each server with its address and whether it uses TLS.
        """
        listener = self._listener
        main = listener.create_server(share_port=True)
        servers = [(main, (self.config.host, self.config.port), True)]
        admin = main
        if listener.admin is not None:
            admin = listener.create_server(share_port=True)
            servers.append((admin, listener.admin, True))
        if listener.health is not None:  # kubelets send no token and use no TLS
            probes = listener.create_health_server()
            servers.append((probes, listener.health, False))
        admin.add_generic_rpc_handlers((GatewayAdmin(self.pool, self.drain),))
        main.add_generic_rpc_handlers((MergedQueries(self.pool), self._forwarder))
        for server, *_ in servers:
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        return servers

    def _make_http(self) -> tuple[HttpServer | None, HttpForwarder | None, ReplicaClient | None]:
        """Create the HTTP server, its application, and the client of replicas, if there is one."""
        if self.config.http_port is None:
            return None, None, None
        from ladderstitch.api.http_server import HttpServer
        from ladderstitch.gateway.http_forwarder import HttpForwarder, gateway_app
        from ladderstitch.gateway.replica_client import ReplicaClient

        try:
            client = ReplicaClient(self.config)
        except (OSError, ValueError) as error:
            raise ConfigError(f"replica_ca, replica_certificate: {error}") from error
        forwarder = HttpForwarder(
            client, self.pool, self.metrics, self.config.retry_timeout_s, lambda: self.serving
        )
        application = gateway_app(
            self.config, forwarder, self._listener.auth, self.metrics, self._buffered
        )
        return HttpServer(self.config, application), forwarder, client

    @property
    def serving(self) -> bool:
        """Whether a request that arrives now would be answered."""
        return not self.drain_announced and bool(self.pool.serving)

    def _why_not_serving(self) -> str:
        """Return why a request that arrives now would not be answered; empty if it would be."""
        if self.drain_announced:
            return "the gateway is draining"
        replicas = list(self.pool.replicas.values())
        if not any(replica.serving for replica in replicas):
            return f"none of {len(replicas)} replicas serves"
        return ""

    def _why_not_alive(self) -> str:
        return "" if self.alive else "a background task of the gateway has failed"

    @property
    def alive(self) -> bool:
        """False if a background task has failed, so that the gateway is out of date."""
        return not any(task.done() and task.exception() is not None for task in self._tasks)

    async def start(self) -> None:
        """Listen, and start to discover replicas; raises `ConfigError` if a port is taken."""
        for server, address, encrypted in self._servers:
            with name_port("port"):
                if not self.config.share_port:
                    self._reserved += reserve(address)
                bound = bind(server, address, self._listener.certificates if encrypted else None)
            self.port = self.port or bound
        with name_port("metrics_port"):
            self._expose_metrics()
        if self.http is not None and self.config.http_port is not None:
            with name_port("http_port"):
                await self.http.start(self.config.http_port, share_port=self.config.share_port)
        await self._update_health()
        await start_servers(server for server, *_ in self._servers)
        self._tasks = [
            asyncio.create_task(self.pool.follow(self._discovery), name="discovery"),
            asyncio.create_task(self._follow_health(), name="health"),
            asyncio.create_task(self._take_over_metrics_port(), name="metrics-port"),
        ]

    def _expose_metrics(self) -> None:
        """Serve metrics on the configured port, or on a free one if another gateway holds it."""
        port, host = self.config.metrics_port, self.config.host
        try:
            exposed = self.metrics.expose(port, host, self._probes)
        except OSError:
            if not self.config.share_port:
                raise
            exposed = self.metrics.expose(0, host, self._probes)
        self.metrics_port, self._close_metrics = exposed

    async def _take_over_metrics_port(self) -> None:
        """Bind the configured metrics port once the gateway that holds it has ended.

        Prometheus thus always finds a gateway on that port.
        """
        port, host = self.config.metrics_port, self.config.host
        while port not in (0, self.metrics_port):
            await asyncio.sleep(PORT_TAKEOVER_POLL_S)
            with contextlib.suppress(OSError):
                exposed = self.metrics.expose(port, host, self._probes)
                close_old = self._close_metrics
                self.metrics_port, self._close_metrics = exposed
                await asyncio.to_thread(close_old)

    async def wait_until_serving(self) -> None:
        """Wait until a replica serves."""
        while not self.pool.serving:
            await self.pool.wait_for_change(1.0)

    async def drain(self, announce_s: float) -> bool:
        """Report NOT_SERVING, and reject new calls after `announce_s`.

        Returns whether the calls in flight ended within `drain_s`.
        """
        self.drain_announced = True
        await self._update_health()
        await asyncio.sleep(announce_s)
        self._reject_new_calls()
        both = await asyncio.gather(
            *(each.in_flight.wait_until_idle(self.config.drain_s) for each in self._forwarders)
        )
        return all(both)

    @property
    def _forwarders(self) -> tuple[Forwarder | HttpForwarder, ...]:
        if self._http_forwarder is None:
            return (self._forwarder,)
        return self._forwarder, self._http_forwarder

    def _reject_new_calls(self) -> None:
        for forwarder in self._forwarders:
            forwarder.draining = True

    async def stop(self) -> None:
        """Drain, then stop the servers and close all connections."""
        self.drain_announced = True
        await self._update_health()
        if not self._forwarder.draining:
            await asyncio.sleep(self.config.drain_announce_s)
        self._reject_new_calls()
        await asyncio.sleep(DRAIN_GRACE_S)
        await self.close(grace_s=self.config.drain_s)

    async def close(self, grace_s: float = 0.0) -> None:
        """Stop the servers, cancel calls in flight after `grace_s` s, and close all connections."""
        await asyncio.gather(
            *(server.stop(grace_s) for server, *_ in self._servers), self._close_http(grace_s)
        )
        release_ports(self._reserved)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.pool.close()
        self._close_metrics()

    async def _close_http(self, grace_s: float) -> None:
        if self.http is None or self._http_forwarder is None or self._http_client is None:
            return
        await self._http_forwarder.in_flight.wait_until_idle(grace_s)
        await self.http.stop()
        await self._http_client.close()

    async def _follow_health(self) -> None:
        while True:
            await self._state_changed.wait()
            self._state_changed.clear()
            await self._update_health()

    async def _update_health(self) -> None:
        """Set services to SERVING while any replica serves, a model while one with it does."""
        models = {model for replica in self.pool.serving for model in replica.models}
        self._health_names |= models
        for name in self._health_names:
            healthy = self.serving and (name in SERVICE_NAMES or name in models)
            await self._health.set(name, SERVING if healthy else NOT_SERVING)

"""The gRPC servers of a replica: inference, and optionally separate ones for admin and health."""

from __future__ import annotations

import asyncio
import socket

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ladderstitch.api.health import NOT_SERVING, SERVING, HealthService
from ladderstitch.api.listener import ListenerConfig, bind, reserve, start_servers
from ladderstitch.api.native.admin import AdminService
from ladderstitch.api.native.generation import GenerationService
from ladderstitch.api.native.inference import InferenceService
from ladderstitch.api.native.replica import ReplicaService
from ladderstitch.api.oip.service import OipService, add_oip_service
from ladderstitch.api.reflection import enable_reflection
from ladderstitch.hosting.registry import AdminActions, ModelRegistry
from ladderstitch.oip import grpc_service_pb2
from ladderstitch.runtime.process import release_ports
from ladderstitch.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    replica_pb2,
    replica_pb2_grpc,
)

INFERENCE_SERVICES: tuple[ServiceDescriptor, ...] = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"],
    grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
    replica_pb2.DESCRIPTOR.services_by_name["ReplicaService"],
)
ADMIN_SERVICES: tuple[ServiceDescriptor, ...] = (
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"],
)
SERVICE_NAMES = tuple(service.full_name for service in (*INFERENCE_SERVICES, *ADMIN_SERVICES))
ACCEPTORS = 4
"""Servers that share the main port; the kernel gives each connection to one of them.

A server of `grpc.aio` accepts one call in each turn of the event loop, however many wait. With 32
connections and a busy loop, four accept two to three times as many in a turn, and the scheduler
gets larger batches.
"""


class Server:
    """The gRPC servers of a replica; they report NOT_SERVING until `set_serving(True)`."""

    def __init__(
        self, registry: ModelRegistry, actions: AdminActions, listener: ListenerConfig
    ) -> None:
        self.registry = registry
        self.listener = listener
        self.health = HealthService()
        self.port = self.admin_port = self.health_port = 0
        self._acceptors = [listener.create_server(share_port=True) for _ in range(ACCEPTORS)]
        self._reserved: list[socket.socket] = []
        self._admin = listener.create_server() if listener.admin else None
        self._probes = None
        if listener.health:  # kubelets send no token and do not use TLS
            self._probes = listener.create_health_server()
        for server in self._acceptors:
            self._add_inference(server, None if listener.admin else actions)
        for server in self._acceptors if self._admin is None else [self._admin]:
            admin = AdminService(registry, actions)
            admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, server)
        self._enable_all_reflection()
        for server in self._servers:
            health_pb2_grpc.add_HealthServicer_to_server(self.health, server)

    @property
    def _servers(self) -> list[grpc.aio.Server]:
        return [s for s in (*self._acceptors, self._admin, self._probes) if s is not None]

    def _add_inference(self, server: grpc.aio.Server, actions: AdminActions | None) -> None:
        add_inference_services(self.registry, server, actions)
        replica_pb2_grpc.add_ReplicaServiceServicer_to_server(ReplicaService(self.registry), server)

    def _enable_all_reflection(self) -> None:
        if self._admin is not None:
            self._enable_reflection(self._admin, ADMIN_SERVICES)
        services = INFERENCE_SERVICES if self._admin else (*INFERENCE_SERVICES, *ADMIN_SERVICES)
        for server in self._acceptors:
            self._enable_reflection(server, services)

    def _enable_reflection(
        self, server: grpc.aio.Server, services: tuple[ServiceDescriptor, ...]
    ) -> None:
        health = health_pb2.DESCRIPTOR.services_by_name["Health"]
        enable_reflection((*services, health), server)

    async def start(self, host: str, port: int) -> int:
        """Bind and listen; returns the bound port. Raises `OSError` if an address is taken."""
        certificates = self.listener.certificates
        first, *others = self._acceptors
        if port and not self.listener.share_port:
            self._reserved = reserve((host, port))
        self.port = bind(first, (host, port), certificates)
        for server in others:
            bind(server, (host, self.port), certificates)
        if self._admin is not None and self.listener.admin is not None:
            self.admin_port = bind(self._admin, self.listener.admin, certificates)
        if self._probes is not None and self.listener.health is not None:
            self.health_port = bind(self._probes, self.listener.health, None)
        await self.set_serving(False)
        await start_servers(self._servers)
        return self.port

    async def set_serving(self, serving: bool) -> None:
        """Set the health of the replica, of each service and of each model."""
        for name in ("", *SERVICE_NAMES, *self.registry.models_by_name):
            await self.health.set(name, SERVING if serving else NOT_SERVING)

    async def set_unloading(self, model: str) -> None:
        """Set the health of a model that is about to be unloaded to NOT_SERVING."""
        if model in self.registry.models_by_name:
            await self.health.set(model, NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Reject new calls; cancel those that are still in flight after `grace_s` seconds."""
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))
        release_ports(self._reserved)


def add_inference_services(
    registry: ModelRegistry, server: grpc.aio.Server, actions: AdminActions | None = None
) -> None:
    """Add the services that answer requests; with `actions`, one of them loads models, too."""
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceService(registry), server)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationService(registry), server)
    add_oip_service(OipService(registry, actions), server)

"""A replica's gRPC servers: inference, and if asked for admin and health on ports of their own."""

from __future__ import annotations

import asyncio

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from ladderstitch.api.listener import ListenerConfig, bind
from ladderstitch.api.native.admin import AdminService
from ladderstitch.api.native.generation import GenerationService
from ladderstitch.api.native.inference import InferenceService
from ladderstitch.api.native.load import ReplicaService
from ladderstitch.api.oip.service import OipService
from ladderstitch.hosting.registry import AdminActions, ModelRegistry
from ladderstitch.oip import grpc_service_pb2, grpc_service_pb2_grpc
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

INFERENCE: tuple[ServiceDescriptor, ...] = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"],
    grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
    replica_pb2.DESCRIPTOR.services_by_name["ReplicaService"],
)
ADMIN: tuple[ServiceDescriptor, ...] = (admin_pb2.DESCRIPTOR.services_by_name["AdminService"],)
SERVICES = tuple(service.full_name for service in (*INFERENCE, *ADMIN))


class Server:
    """Listens from `start` on, but reports NOT_SERVING until `set_serving(True)`."""

    def __init__(
        self, registry: ModelRegistry, control: AdminActions, transport: ListenerConfig
    ) -> None:
        self.registry = registry
        self.transport = transport
        self.health = HealthServicer()
        self.port = self.admin_port = self.health_port = 0
        self._main = transport.server()
        repository = None if transport.admin else control
        self._add_inference(self._main, repository)
        self._admin = transport.server() if transport.admin else None
        self._probes = None
        if transport.health:  # kubelets send no token and speak no TLS
            self._probes = grpc.aio.server(options=transport.options())
        admin_pb2_grpc.add_AdminServiceServicer_to_server(
            AdminService(registry, control), self._admin or self._main
        )
        self._reflect(self._main, INFERENCE if self._admin else (*INFERENCE, *ADMIN))
        if self._admin is not None:
            self._reflect(self._admin, ADMIN)
        for server in self._servers:
            health_pb2_grpc.add_HealthServicer_to_server(self.health, server)

    @property
    def _servers(self) -> list[grpc.aio.Server]:
        return [s for s in (self._main, self._admin, self._probes) if s is not None]

    def _add_inference(self, server: grpc.aio.Server, repository: AdminActions | None) -> None:
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceService(self.registry), server
        )
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationService(self.registry), server
        )
        grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
            OipService(self.registry, repository), server
        )
        replica_pb2_grpc.add_ReplicaServiceServicer_to_server(ReplicaService(self.registry), server)

    def _reflect(self, server: grpc.aio.Server, services: tuple[ServiceDescriptor, ...]) -> None:
        health = health_pb2.DESCRIPTOR.services_by_name["Health"]
        names = [service.full_name for service in (*services, health)]
        reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)

    async def start(self, address: str, port: int) -> int:
        """Bind and listen; the bound port. Raises `OSError` if an address is taken."""
        credentials = self.transport.credentials
        self.port = bind(self._main, (address, port), credentials)
        if self._admin is not None and self.transport.admin is not None:
            self.admin_port = bind(self._admin, self.transport.admin, credentials)
        if self._probes is not None and self.transport.health is not None:
            self.health_port = bind(self._probes, self.transport.health, None)
        await self.set_serving(False)
        for server in self._servers:
            await server.start()
        return self.port

    async def set_serving(self, serving: bool) -> None:
        """Tell health checks and watchers, overall, by service and by model."""
        states = health_pb2.HealthCheckResponse
        state = states.SERVING if serving else states.NOT_SERVING
        for name in ("", *SERVICES, *self.registry.models_by_name):
            await self.health.set(name, state)

    async def forget(self, model: str) -> None:
        """A model is taken away: say so to those who watch its health."""
        if model in self.registry.models_by_name:
            await self.health.set(model, health_pb2.HealthCheckResponse.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Take no new calls; those in flight have `grace_s` to end."""
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))

"""The gRPC server of a replica: our services, the Open Inference Protocol, health, reflection."""

from __future__ import annotations

from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from ladderstitch.hosting import Host, UpdateSettings
from ladderstitch.oip import grpc_service_pb2, grpc_service_pb2_grpc
from ladderstitch.service.admin import AdminService
from ladderstitch.service.generation import GenerationService
from ladderstitch.service.inference import InferenceService
from ladderstitch.service.oip import OipService
from ladderstitch.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)

SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
    grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
)


@dataclass(frozen=True, slots=True)
class Transport:
    """How the server listens; connections have no maximum age unless one is set."""

    max_message_bytes: int = 64 << 20
    keepalive_s: float = 60.0
    max_connection_age_s: float | None = None
    max_connection_grace_s: float = 30.0
    share_port: bool = False  # a rolling replacement needs both to listen for a while
    credentials: grpc.ServerCredentials | None = None

    def options(self) -> list[tuple[str, int]]:
        options = [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.keepalive_time_ms", round(1e3 * self.keepalive_s)),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.so_reuseport", int(self.share_port)),
        ]
        if self.max_connection_age_s is not None:
            options += [
                ("grpc.max_connection_age_ms", round(1e3 * self.max_connection_age_s)),
                ("grpc.max_connection_age_grace_ms", round(1e3 * self.max_connection_grace_s)),
            ]
        return options


class Server:
    """Listens from `start` on, but reports NOT_SERVING until `set_serving(True)`."""

    def __init__(self, host: Host, update: UpdateSettings, transport: Transport) -> None:
        self.host = host
        self.transport = transport
        self.health = HealthServicer()
        self.port = 0
        self._server = grpc.aio.server(options=transport.options())
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceService(host), self._server
        )
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminService(host, update), self._server)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationService(host), self._server
        )
        grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
            OipService(host), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        reflection.enable_server_reflection(
            (*SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
             reflection.SERVICE_NAME), self._server
        )  # fmt: skip

    async def start(self, address: str, port: int) -> int:
        """Bind and listen; the bound port. Raises `OSError` if the address is taken."""
        where = f"{address}:{port}"
        credentials = self.transport.credentials
        try:
            if credentials is None:
                self.port = self._server.add_insecure_port(where)
            else:
                self.port = self._server.add_secure_port(where, credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {where}: is another server there?") from error
        await self.set_serving(False)
        await self._server.start()
        return self.port

    async def set_serving(self, serving: bool) -> None:
        """Tell health checks and watchers, overall, by service and by model."""
        states = health_pb2.HealthCheckResponse
        state = states.SERVING if serving else states.NOT_SERVING
        for name in ("", *SERVICES, *self.host.everything):
            await self.health.set(name, state)

    async def stop(self, grace_s: float) -> None:
        """Take no new calls; those in flight have `grace_s` to end."""
        await self._server.stop(grace_s)

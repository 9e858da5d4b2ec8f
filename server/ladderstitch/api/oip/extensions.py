"""The rpcs of Triton that configure traces, logs and shared memory, none of which is offered.

Clients that only ask for the state get it. Changes end with UNIMPLEMENTED and the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import islice

from ladderstitch.api.status import Context, translate_errors
from ladderstitch.errors import InvalidArgument, Unsupported
from ladderstitch.hosting.registry import ModelRegistry
from ladderstitch.oip import grpc_service_pb2 as pb
from ladderstitch.oip import grpc_service_pb2_grpc

log = logging.getLogger(__name__)

NO_SHARED_MEMORY = "shared memory is not supported: send tensors in the message"
TRACE_SETTINGS = {
    "trace_level": "OFF",
    "trace_rate": "1000",
    "trace_count": "-1",
    "log_frequency": "0",
    "trace_file": "",
    "trace_mode": "triton",
}
"""Triton's settings of a server that records no traces."""


class TritonExtensions(grpc_service_pb2_grpc.GRPCInferenceServiceServicer):
    """The part of the servicer for these rpcs."""

    registry: ModelRegistry

    @translate_errors
    async def TraceSetting(
        self, request: pb.TraceSettingRequest, context: Context
    ) -> pb.TraceSettingResponse:
        """Return that traces are off; raises `Unsupported` for changes."""
        if request.model_name:
            self.registry.find(request.model_name)
        _check_settings(request.settings)
        value = pb.TraceSettingResponse.SettingValue
        settings = {name: value(value=[given]) for name, given in TRACE_SETTINGS.items()}
        return pb.TraceSettingResponse(settings=settings)

    @translate_errors
    async def LogSettings(
        self, request: pb.LogSettingsRequest, context: Context
    ) -> pb.LogSettingsResponse:
        """Return which levels are logged; raises `Unsupported` for changes."""
        _check_settings(request.settings)
        value = pb.LogSettingsResponse.SettingValue
        levels = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
        settings = {
            f"log_{name}": value(bool_param=log.isEnabledFor(level))
            for name, level in levels.items()
        }
        settings["log_verbose_level"] = value(uint32_param=0)
        settings["log_file"] = value(string_param="")
        settings["log_format"] = value(string_param="default")
        return pb.LogSettingsResponse(settings=settings)

    @translate_errors
    async def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest, context: Context
    ) -> pb.SystemSharedMemoryStatusResponse:
        """Return that no region is registered; raises `InvalidArgument` for a region's name."""
        _check_region(request.name)
        return pb.SystemSharedMemoryStatusResponse()

    @translate_errors
    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, context: Context
    ) -> pb.SystemSharedMemoryRegisterResponse:
        """Raise `Unsupported`."""
        raise Unsupported(NO_SHARED_MEMORY)

    @translate_errors
    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, context: Context
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        """Do nothing: as with Triton, unregistering a region that is not registered succeeds."""
        return pb.SystemSharedMemoryUnregisterResponse()

    @translate_errors
    async def CudaSharedMemoryStatus(
        self, request: pb.CudaSharedMemoryStatusRequest, context: Context
    ) -> pb.CudaSharedMemoryStatusResponse:
        """Return that no region is registered; raises `InvalidArgument` for a region's name."""
        _check_region(request.name)
        return pb.CudaSharedMemoryStatusResponse()

    @translate_errors
    async def CudaSharedMemoryRegister(
        self, request: pb.CudaSharedMemoryRegisterRequest, context: Context
    ) -> pb.CudaSharedMemoryRegisterResponse:
        """Raise `Unsupported`."""
        raise Unsupported(NO_SHARED_MEMORY)

    @translate_errors
    async def CudaSharedMemoryUnregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest, context: Context
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        """Do nothing: as with Triton, unregistering a region that is not registered succeeds."""
        return pb.CudaSharedMemoryUnregisterResponse()


def _check_region(name: str) -> None:
    if name:
        raise InvalidArgument("name", f"expected a registered region, got {name[:80]!r}")


def _check_settings(changes: Iterable[str]) -> None:
    if names := list(islice(changes, 3)):
        raise Unsupported(
            f"settings: expected none, got {[name[:80] for name in names]}: logs and traces are "
            "configured when the server starts"
        )

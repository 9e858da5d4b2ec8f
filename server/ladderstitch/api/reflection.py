"""gRPC server reflection, versions 1 and 1 alpha.

`grpcio-reflection` serves version 1 alpha only. The messages of both versions have the same fields
with the same numbers, so that its servicer also answers the calls of version 1.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

V1_PACKAGE = "grpc.reflection.v1"
V1_FILE = "grpc/reflection/v1/reflection.proto"
METHOD = "ServerReflectionInfo"


def _describe_v1() -> ServiceDescriptor:
    """Return the service of version 1, made from that of version 1 alpha by its package alone."""
    pool, file = descriptor_pool.Default(), FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    old, new = f".{file.package}.", f".{V1_PACKAGE}."
    file.name, file.package = V1_FILE, V1_PACKAGE
    for field in (field for message in file.message_type for field in message.field):
        if field.type_name:
            field.type_name = field.type_name.replace(old, new)
    for method in (method for service in file.service for method in service.method):
        method.input_type = method.input_type.replace(old, new)
        method.output_type = method.output_type.replace(old, new)
    pool.AddSerializedFile(file.SerializeToString())  # the same file twice is accepted
    return pool.FindServiceByName(f"{V1_PACKAGE}.ServerReflection")


REFLECTION_SERVICES: tuple[ServiceDescriptor, ...] = (
    reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
    _describe_v1(),
)


def enable_reflection(services: Iterable[ServiceDescriptor], server: grpc.aio.Server) -> None:
    """Let clients of either version ask for the descriptors of some services, and of its own."""
    names = [service.full_name for service in (*services, *REFLECTION_SERVICES)]
    servicer = reflection.aio.ReflectionServicer(names)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    service = f"{V1_PACKAGE}.ServerReflection"
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {METHOD: handler}),)
    )

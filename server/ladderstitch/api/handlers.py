"""What interceptors share: the function inside a gRPC handler, and putting another in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc


def behaviour_of(handler: grpc.RpcMethodHandler) -> Callable[..., Any]:
    """The only one of a handler's four functions that is set."""
    behaviours = (
        handler.unary_unary,
        handler.unary_stream,
        handler.stream_unary,
        handler.stream_stream,
    )
    (behaviour,) = (behaviour for behaviour in behaviours if behaviour is not None)
    found: Callable[..., Any] = behaviour
    return found


def with_behaviour(
    handler: grpc.RpcMethodHandler, behaviour: Callable[..., Any], *, parse: bool = True
) -> grpc.RpcMethodHandler:
    """The same kind of handler around another function; without `parse` it gets bytes."""
    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = makers[handler.request_streaming, handler.response_streaming]
    return make(
        behaviour,
        request_deserializer=handler.request_deserializer if parse else None,
        response_serializer=handler.response_serializer,
    )

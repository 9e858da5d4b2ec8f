"""Translation of errors to gRPC statuses, and helpers to wrap gRPC handlers."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from ladderstitch.client.messages import DETAILS_KEY
from ladderstitch.errors import InternalError, InvalidArgument, Overloaded, RequestError

DOMAIN = "ladderstitch"
"""The domain in `google.rpc.ErrorInfo`."""
PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""Trailing metadata by which gRPC clients delay their next attempt."""

Service = TypeVar("Service")
Reply = TypeVar("Reply")
Context: TypeAlias = grpc.aio.ServicerContext
Handler = Callable[[Service, Any, Context], Awaitable[Reply]]


def translate_errors(handler: Handler[Service, Reply]) -> Handler[Service, Reply]:
    """Return an rpc method that ends the call with a status if `handler` raises.

    A `RequestError` becomes its own status with details. Any other exception becomes INTERNAL with
    an error id, and its traceback is logged under that id.
    """

    @functools.wraps(handler)
    async def call(service: Service, request: Any, context: Context) -> Reply:
        try:
            return await handler(service, request, context)
        except RequestError as error:
            await abort(context, error)
        except Exception as error:
            if isinstance(error, grpc.aio.AbortError):
                raise
            await abort(context, InternalError.logged(handler.__qualname__, error))

    return call


async def abort(context: Context, error: RequestError) -> NoReturn:
    """End the call with the status of `error`, its details and the time to wait before a retry."""
    code = grpc.StatusCode[error.code]
    message = f"{error.reason}: {error}"
    status = Status(code=code.value[0], message=message)
    for detail in _error_details(error):
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    trailer: list[tuple[str, str | bytes]] = [(DETAILS_KEY, status.SerializeToString())]
    if isinstance(error, Overloaded):
        trailer.append((PUSHBACK_KEY, str(max(1, round(1e3 * error.retry_after_s)))))
    await context.abort(code, message, tuple(trailer))
    raise AssertionError("abort raises")


def _error_details(error: RequestError) -> list[Message]:
    details: list[Message] = [
        ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    ]
    if isinstance(error, InvalidArgument):
        violation = BadRequest.FieldViolation(field=error.field, description=str(error))
        details.append(BadRequest(field_violations=[violation]))
    if isinstance(error, Overloaded):
        delay = Duration()
        delay.FromMicroseconds(max(1, round(1e6 * error.retry_after_s)))
        details.append(RetryInfo(retry_delay=delay))
    return details


def handler_function(handler: grpc.RpcMethodHandler) -> Callable[..., Any]:
    """Return the function of a handler: the one of its four function fields that is set."""
    functions = (
        handler.unary_unary,
        handler.unary_stream,
        handler.stream_unary,
        handler.stream_stream,
    )
    (found,) = (function for function in functions if function is not None)
    function: Callable[..., Any] = found
    return function


def replace_handler_function(
    handler: grpc.RpcMethodHandler, function: Callable[..., Any], *, parse: bool = True
) -> grpc.RpcMethodHandler:
    """Return a handler of the same kind that calls `function`.

    Without `parse`, the function gets the request as bytes.
    """
    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = makers[handler.request_streaming, handler.response_streaming]
    return make(
        function,
        request_deserializer=handler.request_deserializer if parse else None,
        response_serializer=handler.response_serializer,
    )

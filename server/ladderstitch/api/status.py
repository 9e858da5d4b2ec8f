"""Translation of errors to gRPC statuses, and helpers to wrap gRPC handlers."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from ladderstitch.client.messages import DETAILS_KEY
from ladderstitch.errors import (
    MAX_MESSAGE_BYTES,
    InternalError,
    InvalidArgument,
    Overloaded,
    RequestError,
    shorten,
)

DOMAIN = "ladderstitch"
"""The domain in `google.rpc.ErrorInfo`."""
PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""Trailing metadata by which gRPC clients delay their next attempt."""
MAX_STATUS_BYTES = MAX_MESSAGE_BYTES + 50
"""Maximum length of the message of a status: an error's reason and its message."""
MAX_TRAILER_BYTES = 4500
"""Maximum size of trailing metadata, so that with any message they stay below 8 KiB."""
ENDS_MORE_THAN_A_REQUEST = (GeneratorExit, KeyboardInterrupt, SystemExit, grpc.aio.AbortError)
"""Exceptions that end the call or the process; so does the cancellation of the task."""

Service = TypeVar("Service")
Reply = TypeVar("Reply")
Context: TypeAlias = grpc.aio.ServicerContext
Handler = Callable[[Service, Any, Context], Awaitable[Reply]]


def translate_errors(handler: Handler[Service, Reply]) -> Handler[Service, Reply]:
    """Return an rpc method that ends the call with a status if `handler` raises.

    `as_request_error` says which status each exception becomes.
    """

    @functools.wraps(handler)
    async def call(service: Service, request: Any, context: Context) -> Reply:
        try:
            return await handler(service, request, context)
        except BaseException as error:
            await abort(context, as_request_error(handler.__qualname__, error))

    return call


def as_request_error(what: str, error: BaseException) -> RequestError:
    """Return the error that ends a request whose handler raised `error`.

    A `RequestError` is returned as it is, also if it is the only one in an exception group. Any
    other exception becomes an `InternalError`: its traceback is logged under an error id, and
    `what` names the operation there. Exceptions of extension modules may derive from
    `BaseException` alone, and a cancelled future may raise `CancelledError` in a task that was not
    cancelled: both end the request only. Raises `error` again if it ends the whole call or the
    process: the call's cancellation, its abort, or a signal.
    """
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        (error,) = error.exceptions
    if isinstance(error, RequestError):
        return error
    if isinstance(error, DecodeError):
        return InvalidArgument(
            "message", "expected a message of the method's type, got other bytes"
        )
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError):
        if task is None or task.cancelling():
            raise error
    elif isinstance(error, ENDS_MORE_THAN_A_REQUEST):
        raise error
    return InternalError.logged(what, error)


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
    await abort_with(context, code, message, trailer)


async def abort_with(
    context: Context,
    code: grpc.StatusCode,
    message: str,
    trailer: Iterable[tuple[str, str | bytes]],
) -> NoReturn:
    """End the call with a status that clients receive whatever was quoted in it.

    The middle of a long message is left out, and so are the entries of the trailing metadata that
    exceed `MAX_TRAILER_BYTES` in all.
    """
    kept, left = [], MAX_TRAILER_BYTES
    for key, value in trailer:
        left -= len(key) + len(value) * 4 // 3  # binary values are sent as base64
        if left >= 0:
            kept.append((key, value))
    await context.abort(code, shorten(message, MAX_STATUS_BYTES), tuple(kept))
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
    handler: grpc.RpcMethodHandler,
    function: Callable[..., Any],
    *,
    parse: bool = True,
    stream: bool = False,
) -> grpc.RpcMethodHandler:
    """Return a handler of the same kind that calls `function`.

    Without `parse`, the function gets the request as bytes. With `stream`, it is called before the
    request is read, and gets an iterator.
    """
    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = makers[stream or handler.request_streaming, handler.response_streaming]
    return make(
        function,
        request_deserializer=handler.request_deserializer if parse else None,
        response_serializer=handler.response_serializer,
    )

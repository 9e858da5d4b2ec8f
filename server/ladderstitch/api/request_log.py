"""Request log: reports every finished request with its cost to log and traces, without payload."""

from __future__ import annotations

import asyncio
import inspect
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import grpc

from ladderstitch.api.status import Context, handler_function, replace_handler_function
from ladderstitch.scheduling.requests import MAX_ID_CHARACTERS
from ladderstitch.telemetry.logs import FieldValue, RecordSink, RequestRecord

LOGGED_METHODS = frozenset({"Infer", "ModelInfer", "Generate"})
OIP_PREFIX = "ladderstitch_"
REQUEST_ID = "x-request-id"
"""Initial metadata of each answer: the caller's request id, or a generated one."""


class RequestLogInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc] # grpc ships no types
    """An interceptor that reports each finished call to `sinks`.

    It comes before `AuthInterceptor`, so that denied calls are reported, too.
    """

    def __init__(self, sinks: Sequence[RecordSink]) -> None:
        self.sinks = sinks

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Return the handler of a call, wrapped if its method is logged."""
        handler = await continuation(details)
        method = details.method.rpartition("/")[2]
        if handler is None or method not in LOGGED_METHODS:
            return handler
        function = handler_function(handler)
        assert not inspect.isasyncgenfunction(function), "logged handlers write to the context"

        async def call(request: Any, context: Context) -> Any:
            return await self._call_and_report(function, method, details, request, context)

        return replace_handler_function(handler, call)

    async def _call_and_report(
        self,
        function: Callable[..., Awaitable[Any]],
        method: str,
        details: grpc.HandlerCallDetails,
        request: Any,
        context: Context,
    ) -> Any:
        started_ns = time.time_ns()
        recording = _RecordingContext(context)
        request_id = _choose_request_id(request)
        code, reply = "UNKNOWN", None
        try:
            await context.send_initial_metadata(((REQUEST_ID, request_id),))
            reply = await function(request, recording)
            code = "OK"
            return reply
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except grpc.aio.AbortError:
            code = recording.aborted
            raise
        finally:
            record = RequestRecord(
                method=method,
                request_id=request_id,
                model=str(getattr(request, "model_name", ""))[:MAX_ID_CHARACTERS],
                code=code,
                started_ns=started_ns,
                ended_ns=time.time_ns(),
                metadata=_loggable_metadata(details.invocation_metadata),
                fields=accounting_fields(reply if reply is not None else recording.last),
            )
            for sink in self.sinks:
                sink(record)


class _RecordingContext:
    """The context of a call; keeps the last message written and the status of an abort."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.last: Any = None
        self.aborted = "UNKNOWN"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:
        self.last = message
        await self._context.write(message)

    async def abort(self, code: grpc.StatusCode, *rest: Any) -> None:
        self.aborted = code.name
        await self._context.abort(code, *rest)


def accounting_fields(reply: Any) -> dict[str, FieldValue]:
    """Return the accounting of a reply of either protocol; nothing if `reply` is None."""
    if reply is None:
        return {}
    if hasattr(reply, "accounting"):
        fields = {described.name: value for described, value in reply.accounting.ListFields()}
    else:
        fields = {
            name.removeprefix(OIP_PREFIX): getattr(value, value.WhichOneof("parameter_choice"))
            for name, value in reply.parameters.items()
            if name.startswith(OIP_PREFIX)
        }
    if "budget_us" in fields and "total_us" in fields:
        fields["slack_us"] = fields["budget_us"] - fields["total_us"]
    return fields


def _choose_request_id(request: Any) -> str:
    """Return the printable ASCII part of the caller's request id, or a random id without one."""
    given = str(getattr(request, "request_id", "") or getattr(request, "id", ""))
    printable = "".join(c for c in given[:MAX_ID_CHARACTERS] if " " <= c <= "~")
    return printable or uuid.uuid4().hex


def _loggable_metadata(metadata: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str]:
    """Return the metadata without binary values and without the token."""
    return {
        key: value
        for key, value in metadata or ()
        if isinstance(value, str) and key != "authorization"
    }

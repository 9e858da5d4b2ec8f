"""Tells the log and traces of every request that ended: what it cost, never what it held."""

from __future__ import annotations

import asyncio
import inspect
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import grpc

from ladderstitch.api.status import Context, behaviour_of, with_behaviour
from ladderstitch.api.validation import MAX_ID_CHARACTERS
from ladderstitch.telemetry.logs import Fact, RecordSink, RequestRecord

WATCHED = frozenset({"Infer", "ModelInfer", "Generate"})
OIP_PREFIX = "ladderstitch_"
REQUEST_ID = "x-request-id"
"""Answered as metadata: the caller's own id, or one that was made up for the log."""


class RequestLogInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc] # grpc ships no types
    """Goes before the guard, so that denied calls are told of, too."""

    def __init__(self, sinks: Sequence[RecordSink]) -> None:
        self.sinks = sinks

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(details)
        method = details.method.rpartition("/")[2]
        if handler is None or method not in WATCHED:
            return handler
        behaviour = behaviour_of(handler)
        assert not inspect.isasyncgenfunction(behaviour), "our handlers write to the context"

        async def call(request: Any, context: Context) -> Any:
            return await self._observed(behaviour, method, details, request, context)

        return with_behaviour(handler, call)

    async def _observed(
        self,
        behaviour: Callable[..., Awaitable[Any]],
        method: str,
        details: grpc.HandlerCallDetails,
        request: Any,
        context: Context,
    ) -> Any:
        started_ns = time.time_ns()
        watched = _Watched(context)
        request_id = _id_of(request)
        code, reply = "UNKNOWN", None
        try:
            await context.send_initial_metadata(((REQUEST_ID, request_id),))
            reply = await behaviour(request, watched)
            code = "OK"
            return reply
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except grpc.aio.AbortError:
            code = watched.aborted
            raise
        finally:
            record = RequestRecord(
                method=method,
                request_id=request_id,
                model=str(getattr(request, "model_name", ""))[:MAX_ID_CHARACTERS],
                code=code,
                started_ns=started_ns,
                ended_ns=time.time_ns(),
                metadata=_texts(details.invocation_metadata),
                facts=facts_of(reply if reply is not None else watched.last),
            )
            for sink in self.sinks:
                sink(record)


class _Watched:
    """The call's context, which also remembers the last message and the status."""

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


def facts_of(reply: Any) -> dict[str, Fact]:
    """What an answer says of its cost, in either protocol; empty for none."""
    if reply is None:
        return {}
    if hasattr(reply, "accounting"):
        facts = {described.name: value for described, value in reply.accounting.ListFields()}
    else:
        facts = {
            name.removeprefix(OIP_PREFIX): getattr(value, value.WhichOneof("parameter_choice"))
            for name, value in reply.parameters.items()
            if name.startswith(OIP_PREFIX)
        }
    if "budget_us" in facts and "total_us" in facts:
        facts["slack_us"] = facts["budget_us"] - facts["total_us"]
    return facts


def _id_of(request: Any) -> str:
    """The caller's, cut to what metadata may hold; one of ours if it has none."""
    given = str(getattr(request, "request_id", "") or getattr(request, "id", ""))
    printable = "".join(c for c in given[:MAX_ID_CHARACTERS] if " " <= c <= "~")
    return printable or uuid.uuid4().hex


def _texts(metadata: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str]:
    """Without binary values, and without the token."""
    return {
        key: value
        for key, value in metadata or ()
        if isinstance(value, str) and key != "authorization"
    }

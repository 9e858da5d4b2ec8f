"""One caller's request at the replicas: its attempts, each call, and how a call ends."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import grpc

from ladderstitch.api.deadlines import HELD_KEY, LATENCY_BUDGET_KEY
from ladderstitch.api.status import Context, abort_with
from ladderstitch.errors import NotReady, RequestError
from ladderstitch.gateway.continued_answer import ContinuedAnswer
from ladderstitch.gateway.replica_connection import ReplicaConnection
from ladderstitch.gateway.replica_pool import ReplicaPool

Metadata = tuple[tuple[str, str | bytes], ...]

BACKOFF_S, MAX_BACKOFF_S = 0.02, 0.5
"""First and longest pause after all replicas were tried; it doubles and is spread by +-50 %."""
MIN_REPORTED_DELAY_S = 0.001
"""A replica is informed of the time that a call spent in the gateway if it is at least this."""
HOP_METADATA = frozenset({"user-agent", HELD_KEY})
"""Metadata keys of one hop, which are not forwarded to the next one."""
REPLICA_FAULT_CODES = frozenset({"UNAVAILABLE", "INTERNAL", "UNKNOWN"})
"""Statuses that count as failures of the replica."""
_random = Random()


class RequestAttempts:
    """The attempts to answer one request, from its arrival until it ends or its time is up."""

    def __init__(
        self,
        pool: ReplicaPool,
        remaining_s: float | None,
        metadata: Iterable[tuple[str, str | bytes]],
        retry_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the request's clock; `remaining_s` is the time to the caller's gRPC deadline.

        None means that the caller has no deadline.
        """
        self._pool, self._clock = pool, clock
        self.arrival = clock()
        self.hard_deadline = math.inf if remaining_s is None else self.arrival + remaining_s
        self._retry_timeout_s = retry_timeout_s
        self._retry_until = min(self.hard_deadline, self.arrival + retry_timeout_s)
        self._metadata: Metadata = tuple((k, v) for k, v in metadata if k not in HOP_METADATA)
        self.soft_deadline = min(self.arrival + _budget_s(self._metadata), self.hard_deadline)
        self._tried: list[ReplicaConnection] = []
        self._pause_s = BACKOFF_S
        self.count = 0
        """Number of attempts so far."""

    @property
    def elapsed_s(self) -> float:
        """Seconds since the request arrived."""
        return self._clock() - self.arrival

    @property
    def timeout_s(self) -> float | None:
        """Seconds left for the next attempt; None without a deadline."""
        if self.hard_deadline == math.inf:
            return None
        return max(self.hard_deadline - self._clock(), 0.0)

    @property
    def metadata(self) -> Metadata:
        """The caller's metadata, and the time spent here, by which its budgets are shorter."""
        held_us = self.held_us
        return self._metadata if held_us is None else (*self._metadata, (HELD_KEY, str(held_us)))

    @property
    def held_us(self) -> int | None:
        """Microseconds since the request arrived that a replica is informed of; None if few."""
        held_s = self.elapsed_s
        return None if held_s < MIN_REPORTED_DELAY_S else round(1e6 * held_s)

    async def next_replica(self) -> ReplicaConnection:
        """Return the replica for the next attempt; wait for one if none serves.

        Raises `NotReady` when the time is up.
        """
        while True:
            replica = self._pool.pick(self.soft_deadline - self._clock(), self._tried)
            if replica is not None:
                self._tried.append(replica)
                self.count += 1
                return replica
            left_s = self._retry_until - self._clock()
            if left_s <= 0:
                raise NotReady("no replica answers; try again later")
            if not self._tried:
                await self._pool.wait_for_change(left_s)
                continue
            self._tried.clear()
            pause_s = self._pause_s * _random.uniform(0.5, 1.5)
            await self._pool.wait_for_change(min(left_s, pause_s))
            self._pause_s = min(2 * self._pause_s, MAX_BACKOFF_S)

    def prefer_model(self, name: str) -> None:
        """Exclude the replicas that lack a model, if any replica has it."""
        serving = self._pool.serving
        lacking = [replica for replica in serving if name not in replica.models]
        if len(lacking) < len(serving):
            self._tried += lacking

    def begin_again(self, failed: ReplicaConnection) -> None:
        """Try all replicas but one, from now on for as long as a new request."""
        self._tried, self._pause_s = [failed], BACKOFF_S
        self._retry_until = min(self.hard_deadline, self._clock() + self._retry_timeout_s)

    def exclude_same_models(self, replica: ReplicaConnection) -> bool:
        """Exclude all replicas with this one's models; return whether others are left."""
        serving = self._pool.serving
        alike = [other for other in serving if other.models == replica.models]
        self._tried += [other for other in alike if other not in self._tried]
        return any(other not in self._tried for other in serving)


class UpstreamFailure(Exception):
    """A call to a replica that ended with a status.

    `response_started` says whether the caller has received part of the response.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        details: str,
        response_started: bool,
        initial: Metadata = (),
        trailing: Metadata = (),
    ) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code, self.details, self.response_started = code, details, response_started
        self.initial, self.trailing = initial, trailing

    @property
    def counts_against_replica(self) -> bool:
        """Whether the status is a failure of the replica and not of the request."""
        return self.code.name in REPLICA_FAULT_CODES

    async def abort_caller(self, context: Context) -> None:
        """End the caller's call with the same status and metadata."""
        if self.initial and not self.response_started:
            await context.send_initial_metadata(self.initial)
        await abort_with(context, self.code, self.details, self.trailing)


async def forward_unary(
    replica: ReplicaConnection,
    method: str,
    request: bytes,
    context: Context,
    attempts: RequestAttempts,
) -> bytes:
    """Return the replica's response to one request; raises `UpstreamFailure`."""
    call = replica.stub("unary_unary", method)(
        request, timeout=attempts.timeout_s, metadata=attempts.metadata
    )
    with _tracked_call(replica, call, attempts):
        reply: bytes = await asyncio.shield(call)
        await _forward_initial_metadata(call, context)
        await _forward_trailing_metadata(call, context)
    return reply


async def forward_stream(
    replica: ReplicaConnection,
    method: str,
    request: bytes,
    context: Context,
    attempts: RequestAttempts,
    answer: ContinuedAnswer | None = None,
) -> None:
    """Forward the stream of responses to one request; raises `UpstreamFailure`.

    With `answer`, the replica gets the request for the rest of it.
    """
    call = replica.stub("unary_stream", method)(
        answer.request if answer else request,
        timeout=attempts.timeout_s,
        metadata=attempts.metadata,
    )
    started = answer is not None and answer.started
    with _tracked_call(replica, call, attempts, response_started=started) as progress:
        await _forward_responses(call, context, progress, answer)


async def forward_bidi(
    replica: ReplicaConnection,
    method: str,
    requests: Any,
    context: Context,
    attempts: RequestAttempts,
) -> None:
    """Forward streams in both directions.

    An error that `requests` raises ends the call. Raises `UpstreamFailure`, always with
    `response_started`: the caller's messages are consumed, so that the call cannot be repeated.
    """
    call = replica.stub("stream_stream", method)(
        timeout=attempts.timeout_s, metadata=attempts.metadata
    )

    refusals: list[RequestError] = []

    async def send() -> None:
        try:
            async for request in requests:
                await call.write(request)
            await call.done_writing()
        except RequestError as error:
            refusals.append(error)
            _cancel_in_core(call)

    with _tracked_call(replica, call, attempts, response_started=True) as progress:
        sending = asyncio.create_task(send())
        try:
            await _forward_responses(call, context, progress)
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            if refusals:
                raise refusals[0] from None
            raise
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


@dataclass(slots=True)
class _Progress:
    response_started: bool


@contextmanager
def _tracked_call(
    replica: ReplicaConnection,
    call: Any,
    attempts: RequestAttempts,
    *,
    response_started: bool = False,
) -> Iterator[_Progress]:
    """Count the call at its replica, and raise `UpstreamFailure` if it fails.

    A cancellation by the caller is passed on; one by the connection becomes UNAVAILABLE.
    """
    progress = _Progress(response_started)
    ticket = replica.add_call(call, attempts.soft_deadline)
    try:
        yield progress
    except grpc.aio.AioRpcError as error:
        raise UpstreamFailure(
            error.code(),
            error.details() or "",
            progress.response_started,
            tuple(error.initial_metadata() or ()),
            tuple(error.trailing_metadata() or ()),
        ) from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # the caller cancelled
            raise
        raise UpstreamFailure(
            grpc.StatusCode.UNAVAILABLE,
            "the connection to the replica was lost",
            progress.response_started,
        ) from None
    finally:
        _cancel_in_core(call)
        replica.remove_call(call, ticket)


def _cancel_in_core(call: Any) -> None:
    """Cancel the call in gRPC's core only, which then ends whatever waits for its next event.

    `call.cancel` drops the waiting operations, and with each of up to six of them 80 bytes
    (grpc/grpc issue 43360): 500 bytes for every caller that disconnects. For the same reason
    everything that is awaited of a call is wrapped in `shield`. If a later version of gRPC has no
    `_cython_call`, `cancel` is used.
    """
    core = getattr(call, "_cython_call", None)
    if core is None:
        call.cancel()
    elif not core.done():
        core.cancel("the caller disconnected")


async def _forward_responses(
    call: Any, context: Context, progress: _Progress, answer: ContinuedAnswer | None = None
) -> None:
    first = answer is None or not answer.started
    while (message := await asyncio.shield(call.read())) is not grpc.aio.EOF:
        if answer is not None and not answer.fits(message):
            raise UpstreamFailure(
                grpc.StatusCode.UNAVAILABLE, "the replica cannot continue answers", True
            )
        if first:
            await _forward_initial_metadata(call, context)
            first, progress.response_started = False, True
        await context.write(message)
        if answer is not None:
            answer.record(message)
    await _forward_trailing_metadata(call, context)


async def _forward_initial_metadata(call: Any, context: Context) -> None:
    if metadata := await call.initial_metadata():
        await context.send_initial_metadata(tuple(metadata))


async def _forward_trailing_metadata(call: Any, context: Context) -> None:
    if metadata := await call.trailing_metadata():
        context.set_trailing_metadata(tuple(metadata))


def _budget_s(metadata: Metadata) -> float:
    """Return the budget that the metadata states; infinite if there is none.

    A malformed budget is ignored here: the replica rejects it.
    """
    values = [value for key, value in metadata if key == LATENCY_BUDGET_KEY]
    try:
        return float(values[0]) / 1e3 if values else math.inf
    except ValueError:
        return math.inf

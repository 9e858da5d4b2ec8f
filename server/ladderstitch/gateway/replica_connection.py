"""Connection to one replica: its channel, its reported state, and whether it is ejected."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import grpc

from ladderstitch.client.channel import Credentials
from ladderstitch.gateway.routing import ReplicaLoad, RequestTicket
from ladderstitch.scheduling.load_report import LoadReport
from ladderstitch.v1 import replica_pb2 as pb

log = logging.getLogger(__name__)

WATCH = "/ladderstitch.v1.ReplicaService/WatchLoad"
REPORT_TIMEOUT_S = 2.5
"""A replica reports every 0.5 s; one without a report for this long is treated as unreachable."""
RECONNECT_S, MAX_RECONNECT_S = 0.1, 2.0
"""First and largest pause before an unreachable replica is tried again."""
STABLE_CONNECTION_S = 10.0
"""A connection that lasted longer resets the pause: it may have reached its maximum age."""
FAILURES_TO_EJECT = 3
"""Number of consecutive failed calls after which a replica is ejected."""
MAX_METADATA_BYTES = 64 << 10
"""Maximum size of a replica's metadata; callers get statuses that they can receive."""
EJECTION_S, MAX_EJECTION_S = 1.0, 30.0
"""First and longest time for which an ejected replica gets no requests."""


class ReplicaConnection:
    """A watched replica, from `start` until `close`; `on_change` is called when its state changes.

    Raises `ValueError` and `OSError` as `Credentials.channel_credentials` does.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        on_change: Callable[[], None],
        max_message_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.address = address
        self.load = ReplicaLoad()
        self.state: pb.WatchLoadResponse | None = None  # None while the replica is unreachable
        self.retired = False
        """Whether the replica was removed from the pool; it then gets no new calls."""
        self.idle = asyncio.Event()
        """Set while no call is in flight."""
        self.idle.set()
        self._on_change, self._clock = on_change, clock
        self._metadata = credentials.metadata
        self._channel = _open_channel(address, credentials, max_message_bytes)
        self._stubs: dict[tuple[str, str], Any] = {}
        self._calls: set[Any] = set()
        self._failures = 0
        self._ejections = 0
        self._ejected_until = 0.0
        self._last_error = ""
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start to watch the replica."""
        self._watching = asyncio.create_task(self._watch(), name=f"watch-{self.address}")

    @property
    def serving(self) -> bool:
        """Whether the replica reports that it accepts requests, and is in the pool."""
        return self.state is not None and self.state.serving and not self.retired

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the replica's models; empty while it is unreachable."""
        return tuple(self.state.models) if self.state is not None else ()

    def is_ejected(self, now: float) -> bool:
        """Return whether the replica failed recently; it is then used only if no other serves."""
        return now < self._ejected_until

    def stub(self, kind: str, method: str) -> Any:
        """Return a callable of bytes, e.g. `stub("unary_unary", "/package.Service/Method")`."""
        found = self._stubs.get((kind, method))
        if found is None:
            found = self._stubs[kind, method] = getattr(self._channel, kind)(method)
        return found

    def add_call(self, call: Any, deadline: float) -> RequestTicket:
        """Count a call to the replica; it is cancelled if the replica stops reporting.

        `deadline` is an instant on the clock. Returns the ticket for `remove_call`.
        """
        self._calls.add(call)
        self.idle.clear()
        return self.load.on_sent(deadline)

    def remove_call(self, call: Any, ticket: RequestTicket) -> None:
        """Stop counting a call that has ended."""
        self._calls.discard(call)
        self.load.on_ended(ticket)
        if not self.load.outstanding:
            self.idle.set()

    def record_success(self) -> None:
        """Reset the count of failures and the time of the next ejection."""
        self._failures = self._ejections = 0

    def record_failure(self) -> None:
        """Count a call that failed through the replica; eject it after `FAILURES_TO_EJECT`."""
        self._failures += 1
        if self._failures >= FAILURES_TO_EJECT:
            self._failures = 0
            seconds = min(EJECTION_S * 2**self._ejections, MAX_EJECTION_S)
            self._ejections += 1
            self._ejected_until = self._clock() + seconds
            log.warning(
                "replica %s ejected for %.0f s after %d consecutive failures",
                self.address,
                seconds,
                FAILURES_TO_EJECT,
            )
            self._on_change()

    async def close(self) -> None:
        """Close the channel at once and cancel the calls in flight."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._channel.close()

    async def _watch(self) -> None:
        """Read the replica's reports; reconnect whenever the stream ends."""
        pause_s = 0.0
        while True:
            started = self._clock()
            try:
                await self._read_reports()
            except grpc.aio.AioRpcError as error:
                self._set_unreachable(f"{error.code().name}: {error.details()}")
            except TimeoutError:
                self._set_unreachable(f"no load report for {REPORT_TIMEOUT_S:g} s")
                for call in tuple(self._calls):
                    call.cancel()
            if self._clock() - started > STABLE_CONNECTION_S:
                pause_s = 0.0
            await asyncio.sleep(pause_s)
            pause_s = min(max(RECONNECT_S, 2 * pause_s), MAX_RECONNECT_S)

    async def _read_reports(self) -> None:
        """Take over each report; raise `TimeoutError` if none arrives in `REPORT_TIMEOUT_S`."""
        stream = self.stub("unary_stream", WATCH)(b"", metadata=self._metadata)
        try:
            while True:
                async with asyncio.timeout(REPORT_TIMEOUT_S):
                    message = await stream.read()
                if message is grpc.aio.EOF:
                    return self._set_unreachable("the replica ended the stream of reports")
                self._set_state(pb.WatchLoadResponse.FromString(message))
        finally:
            stream.cancel()

    def _set_state(self, state: pb.WatchLoadResponse) -> None:
        before, self.state, self._last_error = self.state, state, ""
        self.load.on_report(parse_load_report(state), self._clock())
        if before is None or before.serving != state.serving or before.models != state.models:
            status = "serving" if state.serving else "not serving"
            log.info("replica %s at %s is %s", state.replica, self.address, status)
            self._on_change()

    def _set_unreachable(self, error: str) -> None:
        if error != self._last_error:
            log.warning("replica at %s is unreachable: %s", self.address, error)
            self._last_error = error
        if self.state is not None:
            self.state = None
            self._on_change()


def parse_load_report(state: pb.WatchLoadResponse) -> LoadReport:
    """Return the load in a replica's message, in seconds."""
    return LoadReport(
        waits_s=tuple(wait.wait_us / 1e6 for wait in state.waits) or (0.0,),
        request_s=state.request_us / 1e6,
        batch_s=state.batch_us / 1e6,
        horizons_s=tuple(wait.due_us / 1e6 for wait in state.waits),
    )


def _open_channel(
    address: str, credentials: Credentials, max_message_bytes: int
) -> grpc.aio.Channel:
    options: list[tuple[str, int | str]] = [
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 3_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.enable_retries", 0),  # the gateway retries on another replica
        ("grpc.use_local_subchannel_pool", 1),
        *credentials.channel_options,
    ]
    channel_credentials = credentials.channel_credentials(address)
    if channel_credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, channel_credentials, options=options)

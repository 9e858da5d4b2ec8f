"""One replica as a gateway sees it: a channel, what it says of itself, whether it is well."""

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
SILENCE_S = 2.5
"""A replica speaks every half second; one that does not is stuck, or out of reach."""
RETRY_S, MAX_RETRY_S = 0.1, 2.0
"""How often a replica that is out of reach is tried, at first and in the end."""
FAILURES = 3
"""So many failures in a row, and nothing else, make a replica sick."""
REST_S, MAX_REST_S = 1.0, 30.0
"""How long a sick one gets nothing, the first time and at most."""
CONNECTED_S = 10.0


class ReplicaConnection:
    """Follows one replica from `start` until `close`; `changed` is called when its state does."""

    def __init__(
        self,
        address: str,
        access: Credentials,
        changed: Callable[[], None],
        max_message_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises `ValueError` and `OSError` as `Credentials.credentials` does."""
        self.address = address
        self.view = ReplicaLoad()
        self.state: pb.WatchLoadResponse | None = None  # None: out of reach
        self.retired = False
        self.idle = asyncio.Event()
        self.idle.set()
        self._changed, self._clock = changed, clock
        self._metadata = access.metadata
        self._channel = _channel(address, access, max_message_bytes)
        self._stubs: dict[tuple[str, str], Any] = {}
        self._calls: set[Any] = set()
        self._failures = 0
        self._rests = 0
        self._rest_until = 0.0
        self._complaint = ""
        self._following: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._following = asyncio.create_task(self._follow(), name=f"follow-{self.address}")

    @property
    def serving(self) -> bool:
        """Whether the replica itself says that requests should come."""
        return self.state is not None and self.state.serving and not self.retired

    def resting(self, now: float) -> bool:
        """Whether it failed of late, so that it gets nothing if there is another."""
        return now < self._rest_until

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(self.state.models) if self.state is not None else ()

    def stub(self, kind: str, method: str) -> Any:
        """A callable of bytes, e.g. `stub("unary_unary", "/package.Service/Method")`."""
        found = self._stubs.get((kind, method))
        if found is None:
            found = self._stubs[kind, method] = getattr(self._channel, kind)(method)
        return found

    def opened(self, call: Any, due: float) -> RequestTicket:
        """A call goes to the replica; it is cancelled should the replica fall silent."""
        self._calls.add(call)
        self.idle.clear()
        return self.view.on_sent(due)

    def ended(self, call: Any, mark: RequestTicket) -> None:
        self._calls.discard(call)
        self.view.on_ended(mark)
        if not self.view.outstanding:
            self.idle.set()

    def succeeded(self) -> None:
        self._failures = self._rests = 0

    def failed(self) -> None:
        """A call broke or ended by the replica's fault; several in a row, and it gets a rest."""
        self._failures += 1
        if self._failures >= FAILURES:
            self._failures = 0
            rest_s = min(REST_S * 2**self._rests, MAX_REST_S)
            self._rests += 1
            self._rest_until = self._clock() + rest_s
            log.warning("replica %s fails; no requests for %.0f s", self.address, rest_s)
            self._changed()

    async def close(self) -> None:
        """At once; calls that are under way are cancelled."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await self._channel.close()

    async def _follow(self) -> None:
        """Watch the replica; when that breaks off, again and again."""
        pause_s = 0.0
        while True:
            before = self._clock()
            try:
                await self._watch()
            except grpc.aio.AioRpcError as error:
                self._lose(f"{error.code().name}: {error.details()}")
            except TimeoutError:
                self._lose("silent")
                for call in tuple(self._calls):
                    call.cancel()
            if self._clock() - before > CONNECTED_S:  # a connection may have reached its age
                pause_s = 0.0
            await asyncio.sleep(pause_s)
            pause_s = min(max(RETRY_S, 2 * pause_s), MAX_RETRY_S)

    async def _watch(self) -> None:
        """Take over what the replica says; raises `TimeoutError` when it falls silent."""
        stream = self.stub("unary_stream", WATCH)(b"", metadata=self._metadata)
        try:
            while True:
                async with asyncio.timeout(SILENCE_S):
                    message = await stream.read()
                if message is grpc.aio.EOF:
                    return self._lose("it ended its stream")
                self._hear(pb.WatchLoadResponse.FromString(message))
        finally:
            stream.cancel()

    def _hear(self, state: pb.WatchLoadResponse) -> None:
        before, self.state, self._complaint = self.state, state, ""
        self.view.on_report(load_report_of(state), self._clock())
        if before is None or before.serving != state.serving or before.models != state.models:
            how = "serves" if state.serving else "is there, but does not serve"
            log.info("replica %s at %s %s", state.replica, self.address, how)
            self._changed()

    def _lose(self, why: str) -> None:
        if why != self._complaint:
            log.warning("replica at %s is out of reach: %s", self.address, why)
            self._complaint = why
        if self.state is not None:
            self.state = None
            self._changed()


def load_report_of(state: pb.WatchLoadResponse) -> LoadReport:
    """What a replica says of its load, as routing takes it."""
    return LoadReport(
        waits_s=tuple(wait.wait_us / 1e6 for wait in state.waits) or (0.0,),
        request_s=state.request_us / 1e6,
        batch_s=state.batch_us / 1e6,
        horizons_s=tuple(wait.due_us / 1e6 for wait in state.waits),
    )


def _channel(address: str, access: Credentials, max_message_bytes: int) -> grpc.aio.Channel:
    options: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 3_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.enable_retries", 0),  # here they go to another replica
        ("grpc.use_local_subchannel_pool", 1),
        *access.options,
    ]
    credentials = access.credentials(address)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)

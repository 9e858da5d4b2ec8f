"""One HTTP request at one replica: what is sent, what comes back, and how it can fail."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field

import aiohttp
from starlette.types import Send

from ladderstitch.api.deadlines import HELD_KEY
from ladderstitch.api.openai.event_marks import ANSWER_HEADER
from ladderstitch.gateway.continued_events import ContinuedEvents
from ladderstitch.gateway.http_request import HttpRequest, RawHeaders, forward_headers
from ladderstitch.gateway.replica_client import ReplicaClient
from ladderstitch.gateway.replica_connection import ReplicaConnection

OWN_RESPONSE_HEADERS = frozenset({b"date", b"server", b"vary", ANSWER_HEADER.encode()})
"""Headers that a gateway's own server writes."""
RETRIED = frozenset({503})
"""Statuses of a replica that does not answer for now."""
NOT_FOUND = 404
LOST = "the replica that computed this answer has been lost"


class ReplicaLost(Exception):
    """The connection to a replica failed; `started` if the caller has a part of the response."""

    def __init__(self, reason: str, *, started: bool) -> None:
        super().__init__(reason)
        self.started = started


@dataclass(frozen=True, slots=True)
class HttpRefusal:
    """A replica's response that another replica may improve on."""

    status: int
    headers: RawHeaders
    body: bytes

    async def send(self, send: Send) -> None:
        """Send the response to the caller."""
        await send(_start(self.status, self.headers))
        await send({"type": "http.response.body", "body": self.body})


@dataclass(slots=True, eq=False)
class HttpExchange:
    """A request that is sent to a replica, and its response, which is passed on as it arrives."""

    request: HttpRequest
    send: Send
    answer: ContinuedEvents | None = None
    """The stream that another replica may go on with; None if the request has none."""
    started: bool = field(default=False, init=False)
    """Whether the caller has a part of the response."""
    _is_events: bool = field(default=False, init=False)
    _call: asyncio.Task[HttpRefusal | None] | None = field(default=None, init=False)
    _is_sending: bool = field(default=False, init=False)
    _is_cancelled: bool = field(default=False, init=False)

    @property
    def can_continue(self) -> bool:
        """Whether another replica can go on with the response that the caller has a part of."""
        return self.started and self.answer is not None and self.answer.can_continue

    @property
    def has_grown(self) -> bool:
        """Whether the last replica has added a token to the response."""
        return self.can_continue and self.answer is not None and self.answer.has_grown

    def start(
        self, client: ReplicaClient, replica: ReplicaConnection, held_us: int | None
    ) -> asyncio.Task[HttpRefusal | None]:
        """Return a task that sends the request to a replica, and passes its response on.

        `held_us` is the time that the request has spent here, microseconds; None: little.
        """
        self._is_cancelled = False
        self._call = asyncio.create_task(self._run(client, replica, held_us))
        return self._call

    def cancel(self) -> None:
        """End the call to the replica; what is being sent to the caller is sent first.

        Otherwise it would be unknown whether the caller has it.
        """
        self._is_cancelled = True
        if self._call is not None and not self._is_sending:
            self._call.cancel()

    async def _run(
        self, client: ReplicaClient, replica: ReplicaConnection, held_us: int | None
    ) -> HttpRefusal | None:
        """Pass the response on; return it instead if another replica may have a better one.

        If the caller has a part already, a response that is not the rest is returned, too. Raises
        `ReplicaLost` if the connection fails.
        """
        try:
            async with client.open(replica, self._next_request(held_us)) as response:
                is_rest = self._begin(response)
                if response.status in RETRIED | {NOT_FOUND} or not (is_rest or response.ok):
                    headers = forward_headers(response.raw_headers, OWN_RESPONSE_HEADERS)
                    return HttpRefusal(response.status, headers, await response.read())
                if not is_rest:
                    raise ReplicaLost("the replica cannot continue answers", started=True)
                await self._pass_on(response)
        except (aiohttp.ClientError, OSError) as error:
            raise ReplicaLost(str(error), started=self.started) from error
        await self.send({"type": "http.response.body", "body": b""})
        return None

    async def refuse(self, refusal: HttpRefusal) -> None:
        """End the response with a refusal: as the response itself if the caller has no part."""
        if not self.started:
            await refusal.send(self.send)
            return
        body = b"data: " + b" ".join(refusal.body.split()) + b"\n\n"
        await self.send({"type": "http.response.body", "body": body})

    async def end_events(self) -> bool:
        """End a stream of events with an error; return False if the response is no such stream."""
        if not self._is_events:
            return False
        error = {"message": LOST, "type": "server_error", "param": None, "code": "UNAVAILABLE"}
        event = b"data: " + json.dumps({"error": error}).encode() + b"\n\n"
        await self.send({"type": "http.response.body", "body": event})
        return True

    def _next_request(self, held_us: int | None) -> HttpRequest:
        """Return the request for the rest of the response."""
        held = {HELD_KEY: None if held_us is None else str(held_us)}
        if self.answer is None:
            return self.request.with_headers(held, self.request.body)
        return self.request.with_headers(held | {ANSWER_HEADER: self.answer.name}, self.answer.body)

    def _begin(self, response: aiohttp.ClientResponse) -> bool:
        """Return whether a response is the first one, or the rest of the earlier one."""
        if self.answer is None:
            return not self.started
        is_marked = self.answer.begin(response.headers.get(ANSWER_HEADER))
        return is_marked or not self.started

    async def _pass_on(self, response: aiohttp.ClientResponse) -> None:
        """Send the response on as it arrives, up to its end; raise `ReplicaLost` if it has none."""
        answer = self.answer if self.answer is not None and self.answer.can_continue else None
        if not self.started:
            headers = forward_headers(response.raw_headers, OWN_RESPONSE_HEADERS)
            if answer is not None and answer.is_inner:
                headers = (*headers, (ANSWER_HEADER.encode(), answer.name.encode("latin-1")))
            self._is_events = response.content_type == "text/event-stream"
            self.started = True
            await self.send(_start(response.status, headers))
        async for part in response.content.iter_any():
            await self._send_part(part if answer is None else answer.read(part))
            if answer is not None and answer.lost:
                break
        if answer is not None:
            await self._send_part(answer.finish())
            if answer.lost:
                raise ReplicaLost("the replica cannot complete the answer", started=True)

    async def _send_part(self, part: bytes) -> None:
        if not part:
            return
        self._is_sending = True
        try:
            await self.send({"type": "http.response.body", "body": part, "more_body": True})
        finally:
            self._is_sending = False
        if self._is_cancelled:
            raise ReplicaLost("no load report", started=True)


def _start(status: int, headers: RawHeaders) -> dict[str, object]:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}

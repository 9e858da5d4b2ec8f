"""A stream of events over HTTP that another replica can go on with when its own dies."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from ladderstitch.api.openai.event_marks import (
    ANSWER_FIELD,
    UNAVAILABLE,
    AnswerName,
    split_mark,
)

CONTINUED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})
"""Paths whose streams can go on at another replica."""
END = b"\n\n"


class ContinuedEvents:
    """The events of one answer, the tokens that its caller has, and the request for the rest.

    The last token and all after it are passed on together, when the stream is complete: until then,
    another replica can still compute them.
    """

    def __init__(
        self,
        body: bytes,
        given_name: str | None,
        arrival: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`arrival` is the instant on `clock` at which the request arrived.

        `given_name` is that of a gateway before this one, if there is one.
        """
        self.name = given_name or str(AnswerName.new())
        """The value of the header that names the answer."""
        self.is_inner = given_name is not None
        """Whether the marks are passed on, as a gateway before this one reads them, too."""
        self._body = body
        self._arrival, self._clock = arrival, clock
        self._tokens: list[int] = []
        self._num_known = self._first_token_us = self._num_at_start = 0
        self._is_marked = self._is_open = False
        self._unread = self._held = b""
        self.lost = False
        """Whether the replica has said that it cannot go on."""

    @property
    def can_continue(self) -> bool:
        """Whether another replica can go on."""
        return self._is_marked

    @property
    def has_grown(self) -> bool:
        """Whether the last replica has added a token."""
        return len(self._tokens) > self._num_at_start

    @property
    def body(self) -> bytes:
        """The body of the request for the rest: the original one before the first token.

        Of a field that a body has twice, replicas read the last one.
        """
        if not self._tokens:
            return self._body
        tokens, first_token_us = list(self._tokens), max(1, self._first_token_us)
        if self.is_inner and (earlier := json.loads(self._body).get(ANSWER_FIELD)):
            tokens = earlier["token_ids"] + tokens
            first_token_us = earlier.get("first_token_us") or first_token_us
        field = {"token_ids": tokens, "first_token_us": first_token_us}
        added = json.dumps({ANSWER_FIELD: field}, separators=(",", ":")).encode()
        return self._body.rstrip().removesuffix(b"}") + b"," + added[1:]

    def begin(self, header: str | None) -> bool:
        """Begin to read a replica's events; return whether they can continue the earlier ones.

        `header` is the name of the answer in the replica's response, if it has one.
        """
        self._unread = self._held = b""
        self.lost, self._is_open = False, True
        self._num_at_start = len(self._tokens)
        if header != self.name:
            return False
        self._is_marked = True
        return True

    def read(self, part: bytes) -> bytes:
        """Return what can be passed on of a part of the response; `lost` may be set then."""
        *events, self._unread = (self._unread + part).split(END)
        return b"".join(self._read_event(event + END) for event in events if not self.lost)

    def finish(self) -> bytes:
        """Return the rest of a response that is complete; sets `lost` if the answer is not."""
        self.lost |= self._is_open
        return b"" if self.lost else self._held

    def _read_event(self, event: bytes) -> bytes:
        """Return what can be passed on. Events without a mark go along with the next token."""
        mark, unmarked = split_mark(event)
        self._held += event if self.is_inner else unmarked
        if mark is None:
            return b""
        if mark.token is None or mark.index is None:
            self.lost = mark.status == UNAVAILABLE
            self._is_open = False
            return b""
        if self._tokens and mark.index != self._num_known:
            self.lost = True  # the replica began again from the start
            return b""
        if mark.status is not None:
            self._is_open = False
            return b""
        if not self._tokens:
            self._first_token_us = round(1e6 * (self._clock() - self._arrival))
        self._tokens.append(mark.token)
        self._num_known = mark.index + 1
        passed_on, self._held = self._held, b""
        return passed_on

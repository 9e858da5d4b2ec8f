"""Names of answers, and marks of their events, by which a gateway can let another replica go on.

A gateway names each answer in the header `x-ladderstitch-answer`. A replica that could go on with
such a stream returns the header and writes a mark, a comment, before the events of tokens; clients
ignore comments. When the replica dies, the gateway sends the request with the name and the tokens
(`AnswerSoFar`) to another one, whose events continue those that the caller has.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from ladderstitch.errors import InvalidArgument, RequestError
from ladderstitch.scheduling.generation import TokenChunk

ANSWER_HEADER = "x-ladderstitch-answer"
"""Header with the name of an answer; a replica returns it if the events have marks."""
ANSWER_FIELD = "answer_so_far"
"""Field of the body with the beginning of the answer."""
UNAVAILABLE = "UNAVAILABLE"
MARK = b": ladderstitch "
_NAME = re.compile(r"([0-9a-f]{32})/([0-9]{1,12})")


@dataclass(frozen=True, slots=True)
class AnswerName:
    """What all events of an answer share: 32 hexadecimal digits, and the seconds since 1970."""

    digits: str
    created: int

    @classmethod
    def new(cls) -> AnswerName:
        """Return the name of a new answer."""
        return cls(uuid.uuid4().hex, int(time.time()))

    @classmethod
    def parse(cls, text: str) -> AnswerName:
        """Return the name that a header states; raises `InvalidArgument` if it states none."""
        found = _NAME.fullmatch(text)
        if found is None:
            raise InvalidArgument(
                ANSWER_HEADER, f"expected 32 hexadecimal digits, / and seconds, got {text[:60]!r}"
            )
        return cls(found[1], int(found[2]))

    def __str__(self) -> str:
        return f"{self.digits}/{self.created}"


@dataclass(frozen=True, slots=True)
class EventMark:
    """What a gateway must know of an event: its token, and whether the answer ends with it.

    `status` is the name of the gRPC status that the answer ends with; None while it goes on. An
    error has no token.
    """

    index: int | None = None
    token: int | None = None
    status: str | None = None

    def __str__(self) -> str:
        """Return the comment that precedes the event."""
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        return f"{MARK.decode()}{json.dumps(fields, separators=(',', ':'))}\n"


class EventMarker:
    """The name of an answer, and the marks of its events, which it has while `enabled` is set."""

    def __init__(self, name: AnswerName, *, enabled: bool) -> None:
        self.name, self.enabled = name, enabled

    @classmethod
    def for_headers(cls, headers: Mapping[str, str]) -> EventMarker:
        """Return the marks that the headers of a request ask for.

        Raises `InvalidArgument` if they state a name that is none.
        """
        given = headers.get(ANSWER_HEADER)
        name = AnswerName.new() if given is None else AnswerName.parse(given)
        return cls(name, enabled=given is not None)

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the response."""
        return {ANSWER_HEADER: str(self.name)} if self.enabled else {}

    def before_token(self, chunk: TokenChunk) -> str:
        """Return the mark of a token's event."""
        if not self.enabled:
            return ""
        return str(EventMark(chunk.index, chunk.token, None if chunk.finish is None else "OK"))

    def before_error(self, error: RequestError) -> str:
        """Return the mark of the event of an error."""
        return str(EventMark(status=error.code)) if self.enabled else ""


def split_mark(event: bytes) -> tuple[EventMark | None, bytes]:
    """Return the mark of an event, None without one, and the event without it."""
    if not event.startswith(MARK):
        return None, event
    mark, _, rest = event.partition(b"\n")
    return EventMark(**json.loads(mark[len(MARK) :])), rest

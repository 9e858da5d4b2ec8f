"""Checks of request fields that several services share; each error names the field."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from ladderstitch.errors import BadInput

MAX_ID_CHARACTERS = 128
"""Longest id that a caller may give a request."""
MAX_ANNOUNCE_S = 3600
"""Longest announcement of a drain."""
MAX_PRIORITY = 255


def checked_id(field: str, value: str) -> str:
    """Return a caller's request id; raises `BadInput` if it is too long."""
    if len(value) > MAX_ID_CHARACTERS:
        raise BadInput(field, f"expected at most {MAX_ID_CHARACTERS} characters, got {len(value)}")
    return value


def checked_quality(value: float) -> float:
    """Return a quality floor; raises `BadInput` outside [0, 1]."""
    if not 0 <= value <= 1:  # NaN fails too
        raise BadInput("min_quality", f"expected 0 to 1, got {value}")
    return value


def checked_priority(value: int) -> int:
    """Return a priority, 0 for unset, else 1 (highest) to 255; raises `BadInput` for another."""
    if not 0 <= value <= MAX_PRIORITY:
        raise BadInput("priority", f"expected 0 to {MAX_PRIORITY}, got {value}")
    return value


def announce_seconds(announce: Duration) -> float:
    """Return seconds of a drain's announcement; raises `BadInput` outside 0 s .. 1 h."""
    seconds = announce.ToMicroseconds() / 1e6
    if not 0 <= seconds <= MAX_ANNOUNCE_S:
        raise BadInput("announce", f"expected 0 to {MAX_ANNOUNCE_S} seconds, got {seconds}")
    return seconds

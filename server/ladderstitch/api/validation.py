"""Checks of request fields that several services share; each error names the field."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.duration_pb2 import Duration

from ladderstitch.errors import InvalidArgument

if TYPE_CHECKING:  # gateways check fields, too, and load no model
    from ladderstitch.hosting.registry import TextModel

MAX_ID_CHARACTERS = 128
"""Longest id that a caller may give a request."""
MAX_ANNOUNCE_S = 3600
"""Longest announcement of a drain."""
MAX_PRIORITY = 255


def checked_id(field: str, value: str) -> str:
    """Return a caller's request id; raises `InvalidArgument` if it is too long."""
    if len(value) > MAX_ID_CHARACTERS:
        raise InvalidArgument(
            field, f"expected at most {MAX_ID_CHARACTERS} characters, got {len(value)}"
        )
    return value


def checked_quality(value: float) -> float:
    """Return a quality floor; raises `InvalidArgument` outside [0, 1]."""
    if not 0 <= value <= 1:  # NaN fails too
        raise InvalidArgument("min_quality", f"expected 0 to 1, got {value}")
    return value


def checked_priority(value: int) -> int:
    """Return a priority, 0 for unset, else 1 (highest) to 255; raises `InvalidArgument` for another."""
    if not 0 <= value <= MAX_PRIORITY:
        raise InvalidArgument("priority", f"expected 0 to {MAX_PRIORITY}, got {value}")
    return value


def announce_seconds(announce: Duration) -> float:
    """Return seconds of a drain's announcement; raises `InvalidArgument` outside 0 s .. 1 h."""
    seconds = announce.ToMicroseconds() / 1e6
    if not 0 <= seconds <= MAX_ANNOUNCE_S:
        raise InvalidArgument("announce", f"expected 0 to {MAX_ANNOUNCE_S} seconds, got {seconds}")
    return seconds


DEFAULT_MAX_TOKENS = 128
MAX_STOPS = 16
MAX_CHARACTERS_A_TOKEN = 64
"""Longer texts are refused before they are tokenised, on the event loop."""


def tokenise(text: str, model: TextModel, field: str) -> tuple[int, ...]:
    """A prompt's tokens; raises `InvalidArgument` for one that is too long."""
    most = MAX_CHARACTERS_A_TOKEN * model.max_prompt_tokens
    if len(text) > most:
        raise InvalidArgument(field, f"expected at most {most} characters, got {len(text)}")
    return fitting(tuple(model.scheduler.tokenizer.encode(text)), model)


def fitting(tokens: tuple[int, ...], model: TextModel) -> tuple[int, ...]:
    """The tokens; raises `InvalidArgument` if a prompt may not have so many."""
    if len(tokens) > model.max_prompt_tokens:
        raise InvalidArgument(
            "prompt", f"expected at most {model.max_prompt_tokens} tokens, got {len(tokens)}"
        )
    return tokens

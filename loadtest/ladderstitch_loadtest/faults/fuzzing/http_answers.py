"""Checks of HTTP answers: OpenAI's bodies, streams of events, and error bodies."""

from __future__ import annotations

import json
import math
from typing import Any

from ladderstitch_loadtest.faults.fuzzing.cases import Answer, Case

FINISHES = ("stop", "length")
DONE = "[DONE]"


def loads(data: bytes | str) -> Any:
    """Return a JSON value, in which all numbers must be finite.

    Raises `ValueError` if the text is not JSON.
    """

    def reject(text: str) -> float:
        raise ValueError(f"expected a finite number, got {text}")

    return json.loads(data, parse_constant=reject)


def is_json(data: bytes) -> bool:
    """Return whether Python's parser accepts the bytes, NaN and infinity included."""
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def check_error_body(answer: Answer) -> str:
    """Check that the body is OpenAI's: an error with a message and a type."""
    try:
        error = loads(answer.body[0])["error"]
        complete = bool(error["message"]) and bool(error["type"])
    except (ValueError, KeyError, TypeError) as fault:
        return f"expected an error body, got {answer.body[0][:80]!r} ({fault!r})"
    return "" if complete else f"expected a message and a type, got {error}"


def check_completion(case: Case, answer: Answer) -> str:
    """Check the answer to a completion or a chat, whole or streamed."""
    kind = answer.headers.get("content-type", "")
    try:
        if kind.startswith("text/event-stream"):
            return check_events(answer.body[0].decode())
        return _check_whole(loads(answer.body[0]))
    except (ValueError, KeyError, TypeError, IndexError) as fault:
        return f"expected an answer, got {answer.body[0][:80]!r} ({fault!r})"


def _check_whole(body: dict[str, Any]) -> str:
    if len(body["choices"]) != 1:
        return f"expected one choice, got {len(body['choices'])}"
    choice, usage = body["choices"][0], body["usage"]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    if choice["index"] != 0 or choice["finish_reason"] not in FINISHES or not isinstance(text, str):
        return f"expected text with index 0 and a finish, got {choice}"
    if usage["total_tokens"] != usage["prompt_tokens"] + usage["completion_tokens"]:
        return f"expected a sum of tokens, got {usage}"
    return _check_numbers(body)


def check_events(text: str) -> str:
    """Check a stream of events: one finish, and [DONE] or an error of the request at the end."""
    events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    if not events:
        return "expected events, got none"
    bodies = [loads(event) for event in events if event != DONE]
    finishes = 0
    for number, body in enumerate(bodies):
        if "error" in body:
            return _check_last_error(body["error"], number == len(events) - 1)
        finishes += sum(choice["finish_reason"] is not None for choice in body["choices"])
        if any(choice["index"] != 0 for choice in body["choices"]):
            return f"expected choices with index 0, got {body['choices']}"
    if events.count(DONE) != 1 or events[-1] != DONE:
        return f"expected [DONE] once, at the end, got {events[-1][:80]}"
    return "" if finishes == 1 else f"expected one finish, got {finishes}"


def _check_last_error(error: dict[str, Any], is_last: bool) -> str:
    if error["type"] in ("server_error", "unavailable_error") or not error["message"]:
        return f"expected an error of the request, got {error}"
    return "" if is_last else f"expected nothing after the error {error}"


def _check_numbers(value: Any) -> str:
    """Check that no number is infinite, which JSON can spell as 1e999."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return next((wrong for part in value if (wrong := _check_numbers(part))), "")
    if isinstance(value, float) and not math.isfinite(value):
        return f"expected finite numbers, got {value}"
    return ""

"""Bodies of HTTP requests: their maximum size, and parsing without holding the event loop."""

from __future__ import annotations

import asyncio
import json
from json import scanner
from json.decoder import JSONArray, JSONObject, scanstring  # type: ignore[attr-defined]
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from ladderstitch.api.openai.errors import BodyRejected
from ladderstitch.errors import InvalidArgument
from ladderstitch.hosting.registry import MAX_CHARACTERS_PER_TOKEN, ModelRegistry

Fields = TypeVar("Fields", bound=BaseModel)

OTHER_FIELDS_BYTES = 64 << 10
"""Maximum size of a body without its prompt."""
BYTES_PER_CHARACTER = 6
"""Maximum size of a character in JSON, as in \\u00e9."""
SMALL_BYTES = 16 << 10
"""Size up to which a body is parsed at once, which takes about a millisecond."""
MAX_VALUES = 10_000
"""Maximum number of values of a body other than token ids."""


class _InterruptibleDecoder(json.JSONDecoder):
    """A decoder in Python, so that other threads run in between; strings are decoded in C.

    The decoder in C holds the interpreter's lock for 70 ms per megabyte of small values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parse_object, self.parse_array = JSONObject, JSONArray
        self.parse_string = scanstring
        self.memo: dict[str, str] = {}
        self.scan_once = scanner.py_make_scanner(self)  # type: ignore[attr-defined]


def max_body_bytes(registry: ModelRegistry, max_message_bytes: int) -> int:
    """Return the size of the largest body that a model of the registry can take, in bytes."""
    prompts = [model.max_prompt_tokens for model in registry.text_models.values()]
    characters = MAX_CHARACTERS_PER_TOKEN * max(prompts, default=0)
    return min(max_message_bytes, OTHER_FIELDS_BYTES + BYTES_PER_CHARACTER * characters)


async def parse_body(request: Request, fields: type[Fields]) -> Fields:
    """Return the validated body of a request.

    Raises `BodyRejected` if it is no JSON, `InvalidArgument` for values that no model takes, and
    `RequestValidationError` for wrong fields.
    """
    kind = request.headers.get("content-type", "none").partition(";")[0].strip().lower()
    if not kind.startswith("application/") or not kind.endswith(("/json", "+json")):
        raise InvalidArgument("content-type", f"expected application/json, got {kind[:50]}")
    body = await request.body()
    if len(body) <= SMALL_BYTES:
        return _parse(body, fields)
    return await asyncio.to_thread(_parse, body, fields)


def _parse(body: bytes, fields: type[Fields]) -> Fields:
    decoder = json.JSONDecoder() if len(body) <= SMALL_BYTES else _InterruptibleDecoder()
    try:
        data = decoder.decode(body.decode())
    except json.JSONDecodeError as error:
        raise BodyRejected(
            400,
            f"body: expected JSON, got {error.msg} at line {error.lineno}, column {error.colno}",
        ) from None
    except RecursionError:
        raise BodyRejected(400, "body: expected fewer nested values") from None
    except ValueError as error:  # no UTF-8, or an integer of thousands of digits
        raise BodyRejected(400, f"body: expected JSON in UTF-8, got {str(error)[:200]}") from None
    _check_number_of_values(data)
    try:
        return fields.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        first = {**found[0], "loc": ("body", *found[0]["loc"])}
        raise RequestValidationError([first]) from None


def _check_number_of_values(data: Any) -> None:
    """Raise `InvalidArgument` for more than `MAX_VALUES` values that are no integers."""
    left, waiting = MAX_VALUES, [("body", data)]
    while waiting:
        field, value = waiting.pop()
        if isinstance(value, dict):
            inner = [(key if field == "body" else field, entry) for key, entry in value.items()]
        elif isinstance(value, list):
            inner = [(field, entry) for entry in value if type(entry) is not int]
        else:
            continue
        left -= len(inner)
        if left < 0:
            raise InvalidArgument(
                field[:50], f"expected at most {MAX_VALUES} values besides token ids, got more"
            )
        waiting += inner

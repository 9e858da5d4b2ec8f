"""JSON schemas of callers, made strict enough for a model that writes token by token."""

from __future__ import annotations

import json
from typing import Any

from ladderstitch.errors import InvalidArgument


def close_objects(field: str, schema: Any) -> Any:
    """Return a JSON schema whose objects have no other properties than those that it names.

    A model that may invent properties seldom ends. Objects whose schema says what others may be
    stay as they are, and so does a schema with `allOf`, whose parts name different properties.
    Raises `InvalidArgument`, which names `field`, for one with too many levels.
    """
    try:
        return schema if '"allOf":' in json.dumps(schema) else _close(schema)
    except RecursionError:
        raise InvalidArgument(field, "expected a JSON schema of fewer levels") from None


def _close(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for key in ("properties", "$defs", "definitions"):
        if isinstance(inner := schema.get(key), dict):
            closed[key] = {name: _close(value) for name, value in inner.items()}
    for key in ("anyOf", "oneOf"):
        if isinstance(inner := schema.get(key), list):
            closed[key] = [_close(value) for value in inner]
    if "items" in schema:
        closed["items"] = _close(schema["items"])
    others = ("additionalProperties", "patternProperties", "unevaluatedProperties")
    if schema.get("properties") and not any(key in schema for key in others):
        closed["additionalProperties"] = False
    return closed

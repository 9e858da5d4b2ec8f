"""Mutations of JSON: of its structure, and of its text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ladderstitch_loadtest.faults.fuzzing.odd_values import draw_float, draw_integer, draw_text
from ladderstitch_loadtest.faults.fuzzing.wire import ANY_BYTES, mutate


@dataclass(frozen=True, slots=True)
class Literal:
    """Text that is written as it is in place of a JSON value."""

    text: str


@dataclass(frozen=True, slots=True)
class Pairs:
    """A JSON object as a list of keys and values, so that a key can occur twice."""

    items: tuple[tuple[str, Any], ...]


ODD_LITERALS = (
    "NaN",
    "-Infinity",
    "1e400",
    "-1e400",
    "1E+2",
    "01",
    "+1",
    "0x10",
    ".5",
    "1" * 400,
    "-" + "9" * 5000,
    "1.0000000000000000000000000000001",
    "'a'",
    "undefined",
    "True",
    '"\\ud800"',
    '"\\udc00\\ud800"',
    '"\\u0000"',
    '"\\x41"',
    '"a\tb"',
)
DEPTHS = (5, 60, 500, 3000, 50_000)
EXTRA_KEYS = (
    "n",
    "best_of",
    "echo",
    "suffix",
    "logit_bias",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "tools",
    "tool_choice",
    "response_format",
    "guided_regex",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "logprobs",
    "top_logprobs",
    "stream",
    "stream_options",
    "user",
    "metadata",
    "min_quality",
    "variant_id",
    "priority",
    "chat_template",
    "documents",
    "",
    "__class__",
)


def dumps(value: Any) -> str:
    """Return the JSON text of a value that may contain `Literal` and `Pairs`."""
    if isinstance(value, Literal):
        return value.text
    if isinstance(value, dict):
        value = Pairs(tuple(value.items()))
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(k)}: {dumps(v)}" for k, v in value.items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return json.dumps(value)


def mutate_structure(rng: random.Random, body: Any) -> bytes:
    """Return JSON like that of `body` with one to three of its parts replaced, added or removed.

    The text is in the form of JSON unless a replaced part is not.
    """
    changed = json.loads(json.dumps(body))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        changed = _change(rng, changed)
    return dumps(changed).encode()


def _change(rng: random.Random, value: Any) -> Any:
    """Return the value with one part changed, on average a third of the way down."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        return _change_object(rng, value)
    if isinstance(value, list) and value and rng.random() < 0.7:
        items = list(value)
        at = rng.randrange(len(items))
        items[at : at + 1] = rng.choice(
            ([], [items[at]] * 2, [items[at]] * 300, [_change(rng, items[at])])
        )
        return items
    return draw_value(rng)


def _change_object(rng: random.Random, value: dict[str, Any]) -> Any:
    key = rng.choice(list(value))
    choice = rng.random()
    if choice < 0.5:
        return value | {key: _change(rng, value[key])}
    if choice < 0.8:
        extra = rng.choice(EXTRA_KEYS) if rng.random() < 0.9 else draw_text(rng)
        return value | {extra: draw_value(rng)}
    if choice < 0.9:
        return Pairs((*value.items(), (key, draw_value(rng))))
    return {name: part for name, part in value.items() if name != key}


def draw_value(rng: random.Random, depth: int = 0) -> Any:
    """Return a value of any type: a number, text, list, object, or text that is not JSON."""
    choice = rng.randrange(9 if depth < 3 else 6)
    if choice == 0:
        return rng.choice((None, True, False))
    if choice == 1:
        return draw_integer(rng, -(2**70), 2**70)
    if choice == 2:
        return draw_float(rng)
    if choice in (3, 4):
        return draw_text(rng)
    if choice == 5:
        return Literal(rng.choice(ODD_LITERALS))
    if choice == 6:
        return [draw_value(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    if choice == 7:
        return {draw_text(rng)[:50]: draw_value(rng, depth + 1) for _ in range(rng.randint(0, 3))}
    return Literal(_nested(rng))


def _nested(rng: random.Random) -> str:
    depth = rng.choice(DEPTHS)
    if rng.random() < 0.5:
        return "[" * depth + "]" * depth
    return '{"a":' * depth + "1" + "}" * depth


def mutate_text(rng: random.Random, body: Any) -> bytes:
    """Return the JSON text of `body` with changed bytes, encoding or ends."""
    return rng.choice(TEXT_MUTATIONS)(rng, dumps(body).encode())


TEXT_MUTATIONS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    lambda rng, text: mutate(rng, text, ANY_BYTES),
    lambda rng, text: mutate(rng, text, ANY_BYTES),
    lambda rng, text: mutate(rng, text, ANY_BYTES),
    lambda rng, text: text[: rng.randrange(len(text))],
    lambda rng, text: b"",
    lambda rng, text: b"\xef\xbb\xbf" + text,
    lambda rng, text: text.decode().encode(rng.choice(("utf-16", "utf-32", "utf-16-be"))),
    lambda rng, text: text.replace(b'"', b"'"),
    lambda rng, text: text + rng.choice((b"x", b"{}", b"\0", b"]")),
    lambda rng, text: text.replace(
        b"a", rng.choice((b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\0"))
    ),
    lambda rng, text: b"[" + text + b"]",
    lambda rng, text: rng.choice((b"null", b"1", b'"a"', b"[]", b"{}", b"NaN", b"true")),
    lambda rng, text: _nested(rng).encode(),
)
"""Mutations of the text of a JSON value."""

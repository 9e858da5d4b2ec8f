"""Cases and entrances: what is sent, where, and how the answer is checked."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from google.protobuf.message import Message

from ladderstitch_loadtest.faults.fuzzing.fields import mutate_fields
from ladderstitch_loadtest.faults.fuzzing.headers import (
    Headers,
    mutate_headers,
    mutate_http_headers,
)
from ladderstitch_loadtest.faults.fuzzing.http_bytes import encode_request, mutate_request
from ladderstitch_loadtest.faults.fuzzing.image_files import mutate_image
from ladderstitch_loadtest.faults.fuzzing.json_text import dumps, mutate_structure, mutate_text
from ladderstitch_loadtest.faults.fuzzing.wire import MESSAGE, mutate

MAX_STREAMED = 4
SHORTEST_DEADLINE_S, LONGEST_DEADLINE_S = 0.001, 0.05


class Protocol(Enum):
    """How an entrance is called."""

    UNARY = "unary"
    SERVER_STREAM = "server stream"
    BIDIRECTIONAL = "bidirectional stream"
    HTTP = "HTTP"
    SOCKET = "bytes on a socket"


@dataclass(frozen=True, slots=True)
class Case:
    """One request; equal seeds and indices make equal cases.

    `messages` are encoded messages, one HTTP body, or the bytes for a socket. `deadline_s` is a
    deadline that the caller may miss; None: there is none. The caller cancels after `cancel_after`
    responses; None: never.
    """

    index: int
    kind: str
    entrance: Entrance
    messages: tuple[bytes, ...]
    headers: Headers = ()
    deadline_s: float | None = None
    cancel_after: int | None = None

    def describe(self) -> str:
        """Return one line with what is needed to send the case again without this program."""
        sent = ", ".join(f"{len(m)} bytes {m[:160]!r}" for m in self.messages)
        return f"{self.entrance.name} ({self.kind}) {list(self.headers)[:4]} {sent}"


@dataclass(slots=True)
class Answer:
    """How a request ended: a gRPC or HTTP status, or what happened instead, and the body.

    `status` is the name of a gRPC status, a number of HTTP, or one of `cancelled`, `closed`
    (without a response), `incomplete` (the server waits for more), `hang`, `reset`. `reason` is
    that of the server's error details, and `message` is the error's text. `body` holds one item for
    each gRPC response, or the body of an HTTP response.
    """

    status: str
    reason: str = ""
    message: str = ""
    body: list[bytes] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


Check = Callable[[Case, Answer], str]
"""A function that returns what is wrong with an accepted answer; empty: nothing."""


@dataclass(frozen=True, slots=True)
class Entrance:
    """One rpc or HTTP route with valid requests of it.

    `method` is the path of the rpc or route. `seeds` are messages, or JSON values. `with_image`
    returns a request with these bytes as its image file; None: the entrance takes none. Entrances
    get cases in proportion to `weight`.
    """

    name: str
    protocol: Protocol
    method: str
    seeds: Sequence[Any]
    check: Check
    request_type: type[Message] | None = None
    with_image: Callable[[bytes], Message] | None = None
    weight: int = 1


def draw_case(entrances: Sequence[Entrance], seed: int, index: int) -> Case:
    """Return case number `index` of a seed."""
    rng = random.Random(f"{seed}:{index}")
    entrance = rng.choices(entrances, [entrance.weight for entrance in entrances])[0]
    if entrance.protocol in (Protocol.HTTP, Protocol.SOCKET):
        return _draw_http_case(rng, index, entrance)
    return _draw_rpc_case(rng, index, entrance)


def _draw_rpc_case(rng: random.Random, index: int, entrance: Entrance) -> Case:
    kinds = ["wire"] * 5 + ["fields"] * 8 + ["metadata"] * 2 + ["deadline"]
    if entrance.with_image is not None:
        kinds += ["image"] * 6
    if entrance.protocol is not Protocol.UNARY:
        kinds += ["cancelled"]
    kind = rng.choice(kinds)
    count = 1
    if entrance.protocol is Protocol.BIDIRECTIONAL:
        count = rng.randint(1, MAX_STREAMED)
    messages = [_draw_message(rng, entrance, kind) for _ in range(count)]
    return Case(
        index=index,
        kind=kind,
        entrance=entrance,
        messages=tuple(messages),
        headers=mutate_headers(rng) if kind == "metadata" else (),
        deadline_s=_draw_deadline(rng) if kind == "deadline" else None,
        cancel_after=rng.randint(0, 4) if kind == "cancelled" else None,
    )


def _draw_deadline(rng: random.Random) -> float:
    return rng.uniform(SHORTEST_DEADLINE_S, LONGEST_DEADLINE_S)


def _draw_message(rng: random.Random, entrance: Entrance, kind: str) -> bytes:
    seed: Message = rng.choice(entrance.seeds)
    if kind == "image" and entrance.with_image is not None:
        seed = entrance.with_image(mutate_image(rng))
    if kind == "wire":
        return mutate(rng, seed.SerializeToString(deterministic=True), MESSAGE)
    if kind == "fields":
        return mutate_fields(rng, seed)
    return seed.SerializeToString(deterministic=True)


def _draw_http_case(rng: random.Random, index: int, entrance: Entrance) -> Case:
    seed = rng.choice(entrance.seeds)
    headers: Headers = ()
    if entrance.protocol is Protocol.SOCKET:
        request = encode_request(entrance.method, dumps(seed).encode(), close=True)
        return Case(index, "bytes", entrance, (mutate_request(rng, request),))
    kind = rng.choice(("structure", "structure", "text", "headers"))
    if kind == "structure":
        body = mutate_structure(rng, seed)
    elif kind == "text":
        body = mutate_text(rng, seed)
    else:
        body, headers = dumps(seed).encode(), mutate_http_headers(rng)
    return Case(index, kind, entrance, (body,), headers)

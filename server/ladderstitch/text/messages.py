"""The messages between a group and its ranks: steps, their outputs, and the frames that carry them.

A frame is a kind, a small JSON header and raw bytes, over one socket per rank. The socket is also
the liveness check: if it closes, the other side has died.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Logits = NDArray[np.float32]

FRAME = struct.Struct("<BII")
"""The kind, the number of bytes of the header, and the number of bytes of the body."""

MAX_MESSAGE_BYTES = 1 << 30


class LogitsMode(IntEnum):
    """The logits that a sequence needs of its new tokens."""

    NONE = 0
    BEST = 1  # only the most likely token after the last new token
    LAST = 2  # the logits of the last new token
    ALL = 3


@dataclass(frozen=True, slots=True)
class SequenceInput:
    """The new tokens of one sequence, and the cache blocks that hold the whole sequence.

    The tokens stand at positions `start`, `start` + 1, ...; the earlier ones are in the cache.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    logits_mode: LogitsMode = LogitsMode.BEST

    @property
    def num_logits(self) -> int:
        """The number of tokens whose whole logits the step returns."""
        if self.logits_mode == LogitsMode.ALL:
            return len(self.tokens)
        return int(self.logits_mode == LogitsMode.LAST)


@dataclass(frozen=True, slots=True)
class Translation:
    """Tokens that path `source` computed, and of which `target` needs keys and values.

    The blocks are those of the whole sequence, as in `SequenceInput`.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass over sequences that all take the same path.

    The translations come first. With `write_through`, the keys and values of the new tokens are
    translated for all other paths, too. `planned_s` is the time that the step is expected to take,
    seconds; None: not known. The ranks do not get it.
    """

    inputs: tuple[SequenceInput, ...]
    path: int = 0
    planned_s: float | None = None
    translations: tuple[Translation, ...] = ()
    write_through: bool = False

    @property
    def num_tokens(self) -> int:
        """The number of new tokens of all sequences."""
        return sum(len(sequence.tokens) for sequence in self.inputs)

    def pack(self) -> tuple[dict[str, Any], bytes]:
        """Return the header and the body of a `FORWARD` message."""
        header = {
            "path": self.path,
            "counts": [len(sequence.tokens) for sequence in self.inputs],
            "starts": [sequence.start for sequence in self.inputs],
            "blocks": [len(sequence.blocks) for sequence in self.inputs],
            "logits_modes": [int(sequence.logits_mode) for sequence in self.inputs],
        }
        parts: tuple[SequenceInput | Translation, ...] = (*self.inputs, *self.translations)
        numbers = [n for part in parts for n in (*part.tokens, *part.blocks)]
        if self.translations:
            header["translations"] = [
                (len(t.tokens), t.start, len(t.blocks), t.source, t.target)
                for t in self.translations
            ]
        if self.write_through:
            header["write_through"] = True
        return header, np.array(numbers, np.int32).tobytes()

    @classmethod
    def unpack(cls, header: dict[str, Any], body: bytes | memoryview) -> Step:
        """Return the step of a `FORWARD` message, the inverse of `pack`."""
        numbers = np.frombuffer(body, np.int32).tolist()
        counts, blocks = header["counts"], header["blocks"]
        sizes = [a + b for a, b in zip(counts, blocks, strict=True)]
        begins = [0, *accumulate(sizes)][:-1]
        inputs = tuple(
            SequenceInput(
                numbers[at : at + n], start, numbers[at + n : at + n + m], LogitsMode(mode)
            )
            for at, n, m, start, mode in zip(
                begins, counts, blocks, header["starts"], header["logits_modes"], strict=True
            )
        )
        return cls(
            inputs,
            header["path"],
            translations=_unpack_translations(header, numbers[sum(sizes) :]),
            write_through=header.get("write_through", False),
        )


def _unpack_translations(header: dict[str, Any], numbers: list[int]) -> tuple[Translation, ...]:
    found, at = [], 0
    for count, start, num_blocks, source, target in header.get("translations", ()):
        middle, end = at + count, at + count + num_blocks
        found.append(Translation(numbers[at:middle], start, numbers[middle:end], source, target))
        at = end
    return tuple(found)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The result of a step, in the order of its inputs.

    `best` has the most likely token of each sequence whose mode is `BEST`. `logits` [L, V] has the
    L rows of the sequences whose mode is `LAST` or `ALL`. `non_finite` has the numbers of the
    inputs of which a key, a value or a logit is infinite or NaN.
    """

    best: Tokens
    logits: Logits
    non_finite: frozenset[int] = frozenset()

    @classmethod
    def merge(cls, parts: Sequence[tuple[dict[str, Any], bytes | memoryview]]) -> StepOutput:
        """Return the output over the whole vocabulary.

        `parts` are the header and body of each rank's `LOGITS` message, in the order of the ranks.
        """
        headers = [header for header, _ in parts]
        tokens = np.array([header["tokens"] for header in headers], np.int64)
        best = np.array([header["best"] for header in headers], np.float32).argmax(axis=0)
        logits = [
            np.frombuffer(body, np.float32).reshape(header["shape"]) for header, body in parts
        ]
        non_finite = frozenset(number for header in headers for number in header["non_finite"])
        picked = tokens[best, np.arange(tokens.shape[1])]
        return cls(picked, np.concatenate(logits, axis=-1), non_finite)


def dense_step(
    tokens: Tokens,
    start: int,
    path: int,
    blocks_each: int,
    logits_mode: LogitsMode = LogitsMode.LAST,
) -> Step:
    """Return a step over sequences of equal length, tokens [B, T] at positions from `start` on.

    Sequence b uses the blocks from b * `blocks_each` to (b + 1) * `blocks_each` - 1.
    """
    return Step(
        tuple(
            SequenceInput(
                row.tolist(), start, range(i * blocks_each, (i + 1) * blocks_each), logits_mode
            )
            for i, row in enumerate(tokens)
        ),
        path,
    )


class Kind(IntEnum):
    """The kinds of messages, with their sender and content."""

    REGISTER = 1  # rank: the secret, its process id, the address on which it listens for peers
    LOAD_MODEL = 2  # group: the rank configuration and the rank's number
    MODEL_LOADED = 3  # rank: bytes of weights and cache, seconds of loading
    INIT_COMM = 4  # group: the communicator spec
    READY = 5  # rank: the communicator is connected
    FORWARD = 6  # group: the new tokens of a step
    LOGITS = 7  # rank: the best tokens and the logits of its part of the vocabulary
    FAILED = 8  # rank: the reason why the last request failed
    PING = 9  # group: nothing; every rank replies with READY


@dataclass(frozen=True, slots=True)
class Message:
    """One message; the body is empty except for `FORWARD` and `LOGITS`."""

    kind: Kind
    header: dict[str, Any] = field(default_factory=dict)
    body: bytes | memoryview = b""

    def frame(self) -> bytes:
        """Return the bytes that precede the body on the wire."""
        header = json.dumps(self.header).encode()
        return FRAME.pack(self.kind, len(header), len(self.body)) + header


def send_message(connection: socket.socket, message: Message) -> None:
    """Send a message and block until it is sent; raises `OSError` if the connection has ended."""
    connection.sendall(message.frame())
    if message.body:
        connection.sendall(message.body)


def receive_message(connection: socket.socket) -> Message:
    """Block until a message arrives and return it; raises `EOFError` if the connection ends."""
    kind, header_bytes, body_bytes = _unpack_frame(_read_exactly(connection, FRAME.size))
    header = json.loads(_read_exactly(connection, header_bytes)) if header_bytes else {}
    return Message(Kind(kind), header, memoryview(_read_exactly(connection, body_bytes)))


def write_message(writer: asyncio.StreamWriter, message: Message) -> None:
    """Send a message without waiting; the reader of the connection learns if it has ended."""
    writer.write(message.frame() + message.body)


async def read_message(reader: asyncio.StreamReader, max_bytes: int = MAX_MESSAGE_BYTES) -> Message:
    """Wait for a message and return it; raises `EOFError` or `OSError` if the connection ends.

    Raises `EOFError`, too, if the header or the body is larger than `max_bytes`.
    """
    frame = await reader.readexactly(FRAME.size)
    kind, header_bytes, body_bytes = _unpack_frame(frame, max_bytes)
    header = json.loads(await reader.readexactly(header_bytes)) if header_bytes else {}
    return Message(Kind(kind), header, await reader.readexactly(body_bytes))


def _unpack_frame(
    frame: bytes | bytearray, max_bytes: int = MAX_MESSAGE_BYTES
) -> tuple[int, int, int]:
    kind, header_bytes, body_bytes = FRAME.unpack(frame)
    size = max(header_bytes, body_bytes)
    if size > max_bytes:
        raise EOFError(f"frame: expected at most {max_bytes} bytes, got {size}")
    return kind, header_bytes, body_bytes


def _read_exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = connection.recv_into(view)
        if not got:
            raise EOFError("the connection has ended")
        view = view[got:]
    return data

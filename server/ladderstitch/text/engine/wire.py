"""How a group talks to its ranks: framed messages over one socket each.

A frame is a kind, a small JSON header and raw bytes. The socket is also the life line: its end
tells either side that the other is gone.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

FRAME = struct.Struct("<BII")
"""Kind, bytes of the header, bytes of the body."""

MAX_BYTES = 1 << 30


class Kind(IntEnum):
    HELLO = 1  # rank: here I am (secret, process id, where my link listens)
    ASSIGN = 2  # group: be this rank of that model
    LOADED = 3  # rank: the weights are in memory
    JOIN = 4  # group: talk to your peers by this link
    JOINED = 5
    FORWARD = 6  # group: run these tokens
    LOGITS = 7
    FAILED = 8  # rank: what was asked for last did not work


@dataclass(frozen=True, slots=True)
class Message:
    kind: Kind
    header: dict[str, Any] = field(default_factory=dict)
    body: bytes | memoryview = b""

    def frame(self) -> bytes:
        header = json.dumps(self.header).encode()
        return FRAME.pack(self.kind, len(header), len(self.body)) + header


def send(connection: socket.socket, message: Message) -> None:
    """Blocking; raises `OSError` if the other side is gone."""
    connection.sendall(message.frame())
    if message.body:
        connection.sendall(message.body)


def receive(connection: socket.socket) -> Message:
    """Blocking; raises `EOFError` at the end of the connection."""
    kind, header_bytes, body_bytes = _sizes(_read(connection, FRAME.size))
    header = json.loads(_read(connection, header_bytes)) if header_bytes else {}
    return Message(Kind(kind), header, memoryview(_read(connection, body_bytes)))


async def write(writer: asyncio.StreamWriter, message: Message) -> None:
    """Raises `OSError` if the other side is gone."""
    writer.write(message.frame())
    if message.body:
        writer.write(message.body)
    await writer.drain()


async def read(reader: asyncio.StreamReader) -> Message:
    """Raises `EOFError` or `OSError` at the end of the connection."""
    kind, header_bytes, body_bytes = _sizes(await reader.readexactly(FRAME.size))
    header = json.loads(await reader.readexactly(header_bytes)) if header_bytes else {}
    return Message(Kind(kind), header, await reader.readexactly(body_bytes))


def _sizes(frame: bytes | bytearray) -> tuple[int, int, int]:
    kind, header_bytes, body_bytes = FRAME.unpack(frame)
    if max(header_bytes, body_bytes) > MAX_BYTES:
        raise EOFError(f"a frame of {max(header_bytes, body_bytes)} bytes is not one of ours")
    return kind, header_bytes, body_bytes


def _read(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = connection.recv_into(view)
        if not got:
            raise EOFError("the connection has ended")
        view = view[got:]
    return data

"""A client that speaks HTTP/2 frame by frame, for what gRPC's own clients never send."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from contextlib import suppress

Frame = tuple[int, int, int, bytes]
"""Type, flags, stream and payload."""
DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY, WINDOW = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1


class RawConnection:
    """A plaintext connection that has sent the preface; every call is on stream 1."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> RawConnection:
        """Connect to the port of this machine."""
        raw = cls(*await asyncio.open_connection("127.0.0.1", port))
        raw.writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        raw.send(SETTINGS, 0, 0, b"")
        return raw

    def send(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """Send one frame."""
        head = struct.pack(">I", len(payload))[1:] + bytes([kind, flags])
        self.writer.write(head + struct.pack(">I", stream) + payload)

    def start_call(self, method: str, *metadata: tuple[str, str]) -> None:
        """Send the headers of a call."""
        standard = (
            (":method", "POST"),
            (":scheme", "http"),
            (":path", method),
            (":authority", "x"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        )
        self.send(HEADERS, END_HEADERS, 1, encode_headers((*standard, *metadata)))

    def send_message(self, message: bytes, declared: int | None = None, flag: int = 0) -> None:
        """Send a message, or its beginning if `declared` is larger."""
        size = len(message) if declared is None else declared
        self.send(DATA, 0, 1, bytes([flag]) + struct.pack(">I", size) + message)

    async def read_frame(self) -> Frame | None:
        """Return the next frame, or None at the end of the connection."""
        try:
            head = await self.reader.readexactly(9)
            payload = await self.reader.readexactly(int.from_bytes(head[:3], "big"))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return head[3], head[4], int.from_bytes(head[5:9], "big"), payload

    async def read_until(self, kind: int) -> bytes:
        """Return the payload of the next frame of a type; answers pings and settings before it."""
        while (frame := await self.read_frame()) is not None:
            found, flags, _, payload = frame
            if found == kind and not (kind in (PING, SETTINGS) and flags & ACK == 0):
                return payload
            if found in (SETTINGS, PING) and not flags & ACK:
                self.send(found, ACK, 0, payload if found == PING else b"")
        raise ConnectionError("the server closed the connection")

    async def close(self) -> None:
        """Close the connection."""
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


def encode_headers(headers: Sequence[tuple[str, str]]) -> bytes:
    """Return headers in HPACK, each as a literal that is not indexed."""
    return b"".join(b"\x00" + _text(name) + _text(value) for name, value in headers)


def _text(text: str) -> bytes:
    data = text.encode()
    if len(data) < 127:
        return bytes([len(data)]) + data
    left, size = len(data) - 127, bytearray(b"\x7f")
    while left >= 128:
        size.append(left % 128 + 128)
        left //= 128
    return bytes(size) + bytes([left]) + data

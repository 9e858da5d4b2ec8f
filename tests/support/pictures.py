"""PNG and JPEG files that encoders do not write: many scans, odd chunks, broken EXIF."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

BAD_RATIONAL = b"Exif\0\0" + bytes.fromhex(
    "4d4d002a00000008"  # big-endian, the directory follows
    "0002"
    "01120003000000010006"  # orientation 6
    "0000011a000a000000010000002600000000"  # XResolution, a signed fraction:
    "ffffffff00000000"  # -1 / 0
)
"""EXIF data of orientation 6 that Pillow 13 cannot write again."""


def exif(orientation: int, order: str = ">", kind: int = 3) -> bytes:
    """Return EXIF data with an orientation as value of type `kind`: 1 byte, 3 short, 4 long."""
    letters = {1: "Bxxx", 3: "Hxx", 4: "I"}
    mark = b"MM\0*" if order == ">" else b"II*\0"
    entry = struct.pack(f"{order}HHI{letters[kind]}", 0x0112, kind, 1, orientation)
    return mark + struct.pack(f"{order}IH", 8, 1) + entry + bytes(4)


def colourful(width: int, height: int) -> Image.Image:
    """Return an image whose four corners differ."""
    rows, columns = np.mgrid[0:height, 0:width]
    red, green = rows * 255 // max(1, height - 1), columns * 255 // max(1, width - 1)
    return Image.fromarray(np.stack([red, green, 255 - red], 2).astype(np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """Return the image as a file of a format."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG file."""
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png(
    size: tuple[int, int],
    depth: int,
    colour_type: int,
    rows: bytes,
    *chunks: bytes,
    interlaced: bool = False,
) -> bytes:
    """Return a PNG file of (width, height); `rows` are uncompressed with their filter bytes."""
    header = struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, interlaced)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    parts = (chunk(b"IHDR", header), *chunks, pixels, chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def add_chunks(file: bytes, *chunks: bytes) -> bytes:
    """Return a PNG file with more chunks after its header."""
    return file[:33] + b"".join(chunks) + file[33:]


def add_segment(file: bytes, code: int, content: bytes) -> bytes:
    """Return a JPEG file with another segment at its beginning."""
    return file[:2] + struct.pack(">BBH", 0xFF, code, len(content) + 2) + content + file[2:]


def many_scans(size: tuple[int, int], scans: int) -> bytes:
    """Return a grey progressive JPEG file with this number of scans, at least 6."""
    file = encode(Image.new("L", size), "JPEG", progressive=True)
    last = file[file.rindex(b"\xff\xda") : -2]
    return file[:-2] + last * (scans - file.count(b"\xff\xda")) + b"\xff\xd9"

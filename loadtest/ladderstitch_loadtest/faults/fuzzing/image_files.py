"""Image files, and mutations of them: bytes, chunks, segments, sizes, two files in one."""

from __future__ import annotations

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from ladderstitch_loadtest.faults.fuzzing.wire import ANY_BYTES, mutate

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_START = b"\xff\xd8"
SIZES = (0, 1, 2, 27, 29, 255, 1000, 65_535, 65_536, 2**31 - 1, 2**32 - 1)


@functools.cache
def seed_files() -> tuple[bytes, ...]:
    """Return small valid files: PNG (grey, palette, RGBA, interlaced), JPEG, WebP, GIF."""
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels)
    grey = picture.convert("L")
    files = [
        _encode(grey, "PNG"),
        _encode(picture.convert("P"), "PNG"),
        _encode(picture.convert("RGBA"), "PNG"),
        _encode(grey, "JPEG"),
        _encode(picture, "JPEG", progressive=True),
        _encode(picture, "WEBP"),
        _encode(picture, "WEBP", lossless=True),
        _encode(grey, "GIF"),
    ]
    return tuple(files)


def _encode(picture: Image.Image, kind: str, **options: bool) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def mutate_image(rng: random.Random) -> bytes:
    """Return a mutated image file."""
    file = rng.choice(seed_files())
    return rng.choice(MUTATIONS)(rng, file)


def png_chunks(file: bytes) -> list[tuple[bytes, bytes]]:
    """Return the kind and data of each chunk of a PNG file."""
    chunks, at = [], len(PNG_SIGNATURE)
    while at + 12 <= len(file):
        (length,) = struct.unpack_from(">I", file, at)
        chunks.append((file[at + 4 : at + 8], file[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def png_file(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """Return a PNG file of these chunks, with right lengths and checksums."""
    parts = [PNG_SIGNATURE]
    for kind, data in chunks:
        body = kind + data
        parts += [struct.pack(">I", len(data)), body, struct.pack(">I", zlib.crc32(body))]
    return b"".join(parts)


def jpeg_segments(file: bytes) -> list[bytes]:
    """Return the segments of a JPEG file, each with its marker; the last one has the scan."""
    segments, at = [], len(JPEG_START)
    while at + 4 <= len(file) and file[at] == 0xFF and file[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(file[at + 2 : at + 4], "big")
        segments.append(file[at:end])
        at = end
    return [*segments, file[at:]]


def _mutate_parts(rng: random.Random, file: bytes) -> bytes:
    """Return the file with one chunk or segment removed, repeated, moved or changed."""
    if file.startswith(PNG_SIGNATURE):
        chunks = png_chunks(file)
        at = rng.randrange(len(chunks))
        kind, data = chunks[at]
        other = (kind, mutate(rng, data, ANY_BYTES))
        chunks[at : at + 1] = rng.choice(([], [chunks[at]] * 2, [chunks[at]] * 500, [other]))
        return png_file(_shuffled(rng, chunks))
    if not file.startswith(JPEG_START):
        return mutate(rng, file, ANY_BYTES)
    segments = jpeg_segments(file)
    at = rng.randrange(len(segments))
    changed = segments[at][:4] + mutate(rng, segments[at][4:], ANY_BYTES)
    segments[at : at + 1] = rng.choice(([], [segments[at]] * 2, [segments[at]] * 50, [changed]))
    return JPEG_START + b"".join(_shuffled(rng, segments))


def _shuffled(rng: random.Random, parts: list) -> list:  # type: ignore[type-arg] # of any parts
    if rng.random() < 0.2:
        rng.shuffle(parts)
    return parts


def _change_size(rng: random.Random, file: bytes) -> bytes:
    """Return the file with other dimensions in its header than its data has."""
    width, height = rng.choice(SIZES), rng.choice(SIZES)
    if file.startswith(PNG_SIGNATURE):
        chunks = png_chunks(file)
        header = struct.pack(">II", width, height) + chunks[0][1][8:]
        return png_file([(chunks[0][0], header), *chunks[1:]])
    if not file.startswith(JPEG_START):
        return mutate(rng, file, ANY_BYTES)
    segments = jpeg_segments(file)
    for at, segment in enumerate(segments):
        if segment[1] in (0xC0, 0xC2):
            size = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
            segments[at] = segment[:5] + size + segment[9:]
    return JPEG_START + b"".join(segments)


def _splice(rng: random.Random, file: bytes) -> bytes:
    """Return the start of one file with the end of another."""
    other = rng.choice(seed_files())
    return file[: rng.randrange(len(file))] + other[rng.randrange(len(other)) :]


def _change_bytes(rng: random.Random, file: bytes) -> bytes:
    return mutate(rng, file, ANY_BYTES)


MUTATIONS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _change_bytes,
    _mutate_parts,
    _mutate_parts,
    _change_size,
    _splice,
)
"""Mutations of an image file."""

"""Read the headers of PNG and JPEG files, estimate the cost of decoding, and drop metadata."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from ladderstitch.errors import LadderstitchError

MAX_SIDE = 65_535
"""Maximum width and height in pixels, that of JPEG."""
MAX_SCANS = 64
"""Maximum number of scans of a JPEG file; encoders write 1 to about 20."""
MAX_COST_PER_PIXEL, MIN_COST_LIMIT = 40, 1 << 26
"""Maximum cost of an image for each pixel that the largest image may have; at least 1 << 26."""
MAX_SEGMENTS = 16_384
"""Maximum number of chunks of a PNG file, and of segments before the pixels of a JPEG file."""
COST_PER_SCAN, COST_PER_JPEG_BYTE, ARITHMETIC_FACTOR = 500, 4, 4
COST_PER_PNG_BYTE, COST_PER_PNG_ROW, INTERLACED_FACTOR = 16, 16, 2
"""An empty block of DEFLATE with its own code takes about 10 bytes and 1 microsecond."""
PNG_SIGNATURE, JPEG_SIGNATURE = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
END_CHUNK = struct.pack(">I4sI", 0, b"IEND", 0xAE426082)
KEPT_CHUNKS = (b"IHDR", b"PLTE", b"IDAT")
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
PALETTE_COLOUR = 3
TRANSPARENCY_BYTES = {0: (2,), 2: (6,), 3: range(1, 257)}
"""Valid lengths of the chunk tRNS by colour type; one of another length is metadata."""
PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
MARKER = re.compile(rb"\xff[^\x00\xff]")
START_OF_SCAN, END_OF_IMAGE, EXIF_SEGMENT = 0xDA, 0xD9, 0xE1
STANDALONE_MARKERS = {0x01, 0xD8, *range(0xD0, 0xD8)}
KEPT_SEGMENTS = {0xDB, 0xC4, 0xCC, 0xDD, 0xE0, 0xEE}
"""Quantisation, Huffman and arithmetic tables, restart interval, JFIF, Adobe's colour transform."""
FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}
"""Baseline, extended and progressive frames; the last two are arithmetically coded."""
ARITHMETIC_FRAMES = {0xC9, 0xCA}
OTHER_FRAMES = {0xC3, 0xC5, 0xC6, 0xC7, 0xC8, 0xCB, 0xCD, 0xCE, 0xCF, 0xDE, 0xDF}
ORIENTATION_TAG = 0x0112


class ImageRejected(LadderstitchError):
    """The bytes are no image that is decoded; the text says what was expected and what came."""


class TooManySegments(ImageRejected):
    """The file has more chunks or segments than the reader was allowed to look at."""


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image file without its metadata, and what its headers say.

    `cost` is an upper estimate of the work of decoding: 1 is one sample of one scan, 5 to 10 ns.
    `orientation` is EXIF's, 1 to 8.
    """

    data: bytes
    width: int
    height: int
    cost: int
    orientation: int


@dataclass(frozen=True, slots=True)
class _Frame:
    """The size in pixels of a JPEG image, and its number of samples with the padding of blocks."""

    width: int
    height: int
    samples: int
    arithmetic: bool


def read_headers(data: bytes, max_pixels: int, max_segments: int = MAX_SEGMENTS) -> EncodedImage:
    """Return the image file `data` without metadata, with its size and the cost of decoding it.

    Nothing is decoded; the time is proportional to the number of bytes. Raises `ImageRejected` for
    other formats, broken headers, and images that exceed `max_pixels` pixels, `MAX_SCANS` scans or
    `MAX_COST_PER_PIXEL`, and `TooManySegments`.
    """
    if data.startswith(PNG_SIGNATURE):
        image = _read_png(data, max_pixels, max_segments)
    elif data.startswith(JPEG_SIGNATURE):
        image = _read_jpeg(data, max_pixels, max_segments)
    else:
        raise ImageRejected(f"expected a PNG or JPEG file, got bytes that start with {data[:12]!r}")
    max_cost = max(MAX_COST_PER_PIXEL * max_pixels, MIN_COST_LIMIT)
    if image.cost > max_cost:
        raise ImageRejected(
            f"expected an image that takes at most {max_cost} steps to decode, got {image.cost}"
        )
    return image


def _read_png(data: bytes, max_pixels: int, max_segments: int) -> EncodedImage:
    """Return a PNG file's image: the first one, if it is animated."""
    kept, position, orientation = [PNG_SIGNATURE], len(PNG_SIGNATURE), 1
    width, height, raw_bytes, cost = _read_png_header(data, max_pixels)
    compressed_bytes = 0
    for _ in range(max_segments):
        if position + 8 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if kind == b"IEND":
            break
        if end > len(data) and compressed_bytes and kind != b"IDAT":
            break  # bytes after the pixels
        if end > len(data):
            raise ImageRejected(
                f"expected a whole PNG file, got one that ends within chunk {kind!r}"
            )
        if kind in KEPT_CHUNKS or (
            kind == b"tRNS" and length in TRANSPARENCY_BYTES.get(data[25], ())
        ):
            kept.append(data[position:end])
        if kind == b"IDAT":
            compressed_bytes += length
        elif kind == b"eXIf":
            orientation = _read_orientation(data[position + 8 : end - 4])
        position = end
    else:
        raise TooManySegments(f"expected at most {max_segments} chunks in a PNG file, got more")
    if data[25] == PALETTE_COLOUR and not any(part[4:8] == b"PLTE" for part in kept):
        raise ImageRejected("expected a PNG file with its palette (chunk PLTE), got none")
    if compressed_bytes == 0:
        raise ImageRejected("expected a whole PNG file, got one without pixels (chunk IDAT)")
    max_compressed = 2 * raw_bytes + 65_536
    if compressed_bytes > max_compressed:
        raise ImageRejected(
            f"expected at most {max_compressed} compressed bytes for {width} x {height} pixels, "
            f"got {compressed_bytes}"
        )
    cost += COST_PER_PNG_BYTE * compressed_bytes
    return EncodedImage(b"".join([*kept, END_CHUNK]), width, height, cost, orientation)


def _read_png_header(data: bytes, max_pixels: int) -> tuple[int, int, int, int]:
    """Return width, height, the number of bytes of the pixels, and the cost of those."""
    start = len(PNG_SIGNATURE)
    if len(data) < start + 25 or data[start : start + 8] != b"\0\0\0\x0dIHDR":
        raise ImageRejected("expected a whole PNG file, got one without a header (chunk IHDR)")
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, start + 8)
    check_size(width, height, max_pixels)
    if depth not in PNG_DEPTHS.get(colour, ()):
        raise ImageRejected(
            f"expected a colour type and bit depth of PNG, got {colour} with {depth} bits"
        )
    raw_bytes = height * (1 + -(-width * depth * PNG_CHANNELS[colour] // 8))
    cost = (INTERLACED_FACTOR if interlaced else 1) * (raw_bytes + COST_PER_PNG_ROW * height)
    return width, height, raw_bytes, cost


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise `ImageRejected` unless the size in pixels is that of an image that is decoded."""
    size = f"{width} x {height}"
    if width < 1 or height < 1:
        raise ImageRejected(f"expected at least 1 pixel, got {size}")
    if width * height > max_pixels:
        raise ImageRejected(f"expected at most {max_pixels} pixels, got {size}")
    if max(width, height) > MAX_SIDE:
        raise ImageRejected(f"expected at most {MAX_SIDE} pixels on each side, got {size}")


def _read_jpeg(data: bytes, max_pixels: int, max_segments: int) -> EncodedImage:
    """Return a JPEG file's image: the first one, if others follow."""
    kept, position, orientation = [JPEG_SIGNATURE], len(JPEG_SIGNATURE), 1
    frame: _Frame | None = None
    for _ in range(max_segments):
        code, start, end = _next_segment(data, position)
        if code == START_OF_SCAN:
            break
        position = end
        if code in FRAMES:
            if frame is not None:
                raise ImageRejected("expected one frame in a JPEG file, got two")
            frame = _read_frame(code, data[start + 2 : end], max_pixels)
        if code in FRAMES or code in KEPT_SEGMENTS:
            kept.append(data[start - 2 : end])
        elif code in OTHER_FRAMES:
            raise ImageRejected(
                f"expected a baseline or progressive JPEG file, got frame type 0x{code:02x}"
            )
        elif code == EXIF_SEGMENT and data.startswith(b"Exif\0\0", start + 2):
            orientation = _read_orientation(data[start + 8 : end])
    else:
        raise TooManySegments(f"expected at most {max_segments} segments in a JPEG file, got more")
    if frame is None:
        raise ImageRejected("expected a whole JPEG file, got pixels before the frame header")
    pixels, scans = _read_scans(data, start - 2, end)
    cost = (frame.samples + COST_PER_SCAN) * scans + COST_PER_JPEG_BYTE * len(pixels)
    cost *= ARITHMETIC_FACTOR if frame.arithmetic else 1
    return EncodedImage(b"".join([*kept, pixels]), frame.width, frame.height, cost, orientation)


def _next_segment(data: bytes, position: int) -> tuple[int, int, int]:
    """Return the code of the next marker, and the positions after the marker and its segment."""
    marker = MARKER.search(data, position)
    if marker is None or data[marker.end() - 1] == END_OF_IMAGE:
        raise ImageRejected("expected a whole JPEG file, got one that ends before its pixels")
    code, start = data[marker.end() - 1], marker.end()
    if code in STANDALONE_MARKERS:
        return code, start, start
    length = int.from_bytes(data[start : start + 2], "big")
    if length < 2 or start + length > len(data):
        raise ImageRejected(
            f"expected a whole JPEG file, got one that ends within segment 0x{code:02x}"
        )
    return code, start, start + length


def _read_frame(code: int, header: bytes, max_pixels: int) -> _Frame:
    if len(header) < 6 or len(header) < 6 + 3 * header[5]:
        raise ImageRejected(f"expected a JPEG frame header, got {len(header)} bytes")
    precision, height, width, num_components = struct.unpack_from(">BHHB", header)
    if precision != 8 or num_components not in (1, 3, 4):
        raise ImageRejected(
            "expected a JPEG file of 8 bits and 1, 3 or 4 components, "
            f"got {precision} bits and {num_components}"
        )
    check_size(width, height, max_pixels)
    factors = [divmod(header[7 + 3 * i], 16) for i in range(num_components)]
    if not all(1 <= factor <= 4 for pair in factors for factor in pair):
        raise ImageRejected(f"expected sampling factors from 1 to 4, got {factors}")
    across = -(-width // (8 * max(horizontal for horizontal, _ in factors)))
    down = -(-height // (8 * max(vertical for _, vertical in factors)))
    samples = 64 * across * down * sum(horizontal * vertical for horizontal, vertical in factors)
    return _Frame(width, height, samples, code in ARITHMETIC_FRAMES)


def _read_scans(data: bytes, first: int, first_end: int) -> tuple[bytes, int]:
    """Return the bytes from the first scan at `first` to the end of the image, and their scans.

    Coded pixels never contain the bytes of these two markers, so the number is never too small.
    """
    end = data.find(bytes((0xFF, END_OF_IMAGE)), first_end)
    end = len(data) if end < 0 else end + 2
    scans = 1 + data.count(bytes((0xFF, START_OF_SCAN)), first_end, end)
    if scans > MAX_SCANS:
        raise ImageRejected(f"expected at most {MAX_SCANS} scans in a JPEG file, got {scans}")
    return data[first:end], scans


def _read_orientation(exif: bytes) -> int:
    """Return the orientation in EXIF data; 1, which is upright, if they are broken or have none."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 8:
        return 1
    (directory,) = struct.unpack_from(f"{order}I", exif, 4)
    if directory + 2 > len(exif):
        return 1
    (num_entries,) = struct.unpack_from(f"{order}H", exif, directory)
    first = directory + 2
    for entry in range(first, min(first + 12 * num_entries, len(exif) - 11), 12):
        tag, kind, count = struct.unpack_from(f"{order}HHI", exif, entry)
        if tag == ORIENTATION_TAG:
            letter = {1: "B", 3: "H", 4: "I"}.get(kind)
            if letter is None or count != 1:
                return 1
            (value,) = struct.unpack_from(f"{order}{letter}", exif, entry + 8)
            return value if 1 <= value <= 8 else 1
    return 1

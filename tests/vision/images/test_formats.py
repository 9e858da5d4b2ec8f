"""Tests of the headers: what is decoded, what is rejected, and what it costs."""

from __future__ import annotations

import contextlib
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ladderstitch.vision.images.decode import InputFormat, decode
from ladderstitch.vision.images.formats import (
    MAX_SCANS,
    MAX_SEGMENTS,
    ImageRejected,
    TooManySegments,
    read_headers,
)
from tests.support.pictures import (
    add_chunks,
    add_segment,
    chunk,
    colourful,
    encode,
    exif,
    many_scans,
    png,
)

MAX_PIXELS = 1_000_000
TARGET = InputFormat(3, 8, 8, "bilinear", None, (255, 255, 255))
OTHER_FORMATS = ("GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "PDF", "EPS", "TGA", "SGI", "DDS")


def reject(file: bytes, max_pixels: int = MAX_PIXELS) -> str:
    """Return the reason for which the headers of the file are rejected."""
    with pytest.raises(ImageRejected) as rejected:
        read_headers(file, max_pixels)
    return str(rejected.value)


@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_read_headers_other_format_is_rejected(kind: str) -> None:
    assert "expected a PNG or JPEG file, got bytes" in reject(encode(colourful(9, 9), kind))


@pytest.mark.parametrize("magic", [b"%!PS-Adobe-3.0", b"8BPS\0\1", b"\0\0\0\x1cftypheic", b"\xff"])
def test_read_headers_other_magic_is_rejected(magic: bytes) -> None:
    assert "expected a PNG or JPEG file, got bytes" in reject(magic + bytes(100))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_read_headers_jpeg_has_size_and_cost(mode: str, progressive: bool) -> None:
    image = colourful(37, 21).convert(mode)
    header = read_headers(encode(image, "JPEG", progressive=progressive), MAX_PIXELS)
    assert (header.width, header.height, header.orientation) == (37, 21, 1)
    assert header.cost > 37 * 21


def test_read_headers_too_many_scans_are_rejected() -> None:
    assert read_headers(many_scans((8, 8), MAX_SCANS), MAX_PIXELS).width == 8
    for scans in (MAX_SCANS + 1, 5_000):
        expected = f"expected at most {MAX_SCANS} scans in a JPEG file, got {scans}"
        assert reject(many_scans((8, 8), scans)) == expected


def test_read_headers_scans_behind_fill_bytes_are_counted() -> None:
    file = many_scans((8, 8), 6)
    last = file[file.rindex(b"\xff\xda") : -2]
    hidden = file[:-2] + (b"\xff\xff\xff" + last) * 100 + b"\xff\xd9"
    assert "scans in a JPEG file, got 106" in reject(hidden)


def test_read_headers_markers_in_metadata_are_no_scans() -> None:
    """A thumbnail in a segment and a second file after the image have scans of their own."""
    file = encode(colourful(16, 16), "JPEG")
    thumbnail = add_segment(file, 0xE1, b"Exif\0\0" + b"\xff\xda" * 1000 + b"\xff\xd9")
    expected = read_headers(file, MAX_PIXELS)
    assert read_headers(thumbnail + file * 100, MAX_PIXELS).data == expected.data


def test_read_headers_cost_grows_with_scans_and_padding() -> None:
    few, many = (read_headers(many_scans((64, 64), n), MAX_PIXELS).cost for n in (6, 60))
    assert many > 9 * few
    narrow = encode(Image.new("RGB", (1, 4096)), "JPEG")
    assert read_headers(narrow, MAX_PIXELS).cost > 16 * 4096


def test_read_headers_many_pixels_in_many_scans_are_rejected() -> None:
    """Either is allowed: a large image has fewer scans."""
    assert read_headers(many_scans((2_000, 2_000), 10), 4_000_000).width == 2_000
    assert read_headers(many_scans((200, 200), MAX_SCANS), 4_000_000).width == 200
    reason = "expected an image that takes at most 160000000 steps to decode, got"
    assert reason in reject(many_scans((2_000, 2_000), MAX_SCANS), 4_000_000)


def test_read_headers_interlaced_costs_more() -> None:
    rows = bytes(10 * 31)
    plain = read_headers(png((10, 10), 8, 2, rows), MAX_PIXELS)
    interlaced = read_headers(png((10, 10), 8, 2, rows, interlaced=True), MAX_PIXELS)
    assert interlaced.cost > plain.cost


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((0, 5), "expected at least 1 pixel, got 0 x 5"),
        ((2_000, 2_000), "expected at most 1000000 pixels, got 2000 x 2000"),
        ((70_000, 1), "expected at most 65535 pixels on each side, got 70000 x 1"),
        ((2**31, 2**31), "expected at most 1000000 pixels"),
    ],
)
def test_read_headers_size_out_of_range_is_rejected(size: tuple[int, int], reason: str) -> None:
    assert reason in reject(png(size, 8, 0, b"\0"))


def test_read_headers_jpeg_size_out_of_range_is_rejected() -> None:
    file = encode(colourful(20, 20), "JPEG")
    frame = file.index(b"\xff\xc0")
    huge = file[: frame + 5] + struct.pack(">HH", 65_535, 65_535) + file[frame + 9 :]
    assert "expected at most 1000000 pixels, got 65535 x 65535" in reject(huge)
    empty = file[: frame + 5] + struct.pack(">HH", 0, 20) + file[frame + 9 :]
    assert "expected at least 1 pixel, got 20 x 0" in reject(empty)


def test_read_headers_more_compressed_bytes_than_pixels_are_rejected() -> None:
    """Empty blocks of DEFLATE cost time, but yield no pixels."""
    file = encode(Image.new("L", (8, 8)))
    padded = add_chunks(file, chunk(b"IDAT", bytes(70_000)))
    assert "compressed bytes for 8 x 8 pixels, got" in reject(padded)


def test_read_headers_too_many_segments_are_rejected() -> None:
    empty = chunk(b"tEXt", b"")
    with pytest.raises(TooManySegments, match=f"at most {MAX_SEGMENTS} chunks"):
        read_headers(add_chunks(encode(colourful(8, 8)), empty * MAX_SEGMENTS), MAX_PIXELS)
    comment = b"\xff\xfe\0\2"
    file = encode(colourful(8, 8), "JPEG")
    with pytest.raises(TooManySegments, match=f"at most {MAX_SEGMENTS} segments"):
        read_headers(file[:2] + comment * MAX_SEGMENTS + file[2:], MAX_PIXELS)


@pytest.mark.parametrize("code", [0xC3, 0xC5, 0xC8, 0xCB, 0xCF, 0xDE])
def test_read_headers_other_frame_is_rejected(code: int) -> None:
    """Lossless and hierarchical files have no limits of cost."""
    file = encode(colourful(20, 20), "JPEG").replace(b"\xff\xc0", bytes((0xFF, code)))
    assert f"baseline or progressive JPEG file, got frame type 0x{code:02x}" in reject(file)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [1, 3, 4])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_headers_returns_the_orientation(orientation: int, kind: int, order: str) -> None:
    content = exif(orientation, order, kind)
    jpeg = add_segment(encode(colourful(8, 8), "JPEG"), 0xE1, b"Exif\0\0" + content)
    image = add_chunks(encode(colourful(8, 8)), chunk(b"eXIf", content))
    for file in (jpeg, image):
        assert read_headers(file, MAX_PIXELS).orientation == orientation


@given(st.binary(max_size=60), st.booleans())
def test_read_headers_broken_exif_is_upright_or_turned(content: bytes, big: bool) -> None:
    start = b"MM\0*\0\0\0\x08" if big else b"II*\0\x08\0\0\0"
    file = add_segment(encode(colourful(8, 8), "JPEG"), 0xE1, b"Exif\0\0" + start + content)
    assert 1 <= read_headers(file, MAX_PIXELS).orientation <= 8


FILES = [
    encode(colourful(12, 9)),
    encode(colourful(12, 9).convert("P")),
    encode(colourful(12, 9).convert("RGBA")),
    png((8, 8), 16, 6, bytes(8 * 65), interlaced=True),
    encode(colourful(12, 9), "JPEG"),
    encode(colourful(12, 9).convert("CMYK"), "JPEG", progressive=True),
]


@given(st.sampled_from(FILES), st.data())
def test_decode_mutated_file_is_decoded_or_rejected(file: bytes, data: st.DataObject) -> None:
    """No mutation of a file raises another error; the checks of PNG chunks are made right."""
    mutated = bytearray(file)
    for position in data.draw(st.lists(st.integers(8, len(file) - 1), max_size=4)):
        mutated[position] = data.draw(st.integers(0, 255))
    end = data.draw(st.one_of(st.just(len(mutated)), st.integers(2, len(mutated))))
    with contextlib.suppress(ImageRejected):
        pixels = decode(read_headers(_with_checks(bytes(mutated[:end])), 10_000), TARGET)
        assert len(pixels) == 8 * 8 * 3


def _with_checks(file: bytes) -> bytes:
    """Return a PNG file with the right check of each chunk, so that mutations are read."""
    if not file.startswith(b"\x89PNG"):
        return file
    position, parts = 8, [file[:8]]
    while position + 12 <= len(file):
        (length,) = struct.unpack_from(">I", file, position)
        body = file[position + 4 : position + 8 + length]
        parts.append(file[position : position + 4] + body + struct.pack(">I", zlib.crc32(body)))
        position += 12 + length
    return b"".join(parts)

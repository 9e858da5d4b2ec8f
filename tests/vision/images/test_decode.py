"""Tests of decoding: orientation, metadata, transparency, bit depths and colours."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from ladderstitch.vision.bundle import Preprocessing
from ladderstitch.vision.images.decode import InputFormat, decode
from ladderstitch.vision.images.formats import read_headers
from tests.support.pictures import (
    BAD_RATIONAL,
    add_chunks,
    add_segment,
    chunk,
    colourful,
    encode,
    exif,
    png,
)

RED = (200, 0, 0)


def pixels(file: bytes, target: InputFormat) -> np.ndarray:
    """Return the decoded pixels [height, width, channels]."""
    found = decode(read_headers(file, 10_000_000), target)
    return np.frombuffer(found, np.uint8).reshape(target.height, target.width, target.channels)


def of_size(width: int, height: int, channels: int = 3) -> InputFormat:
    """Return the format of a model whose inputs have this size, on a red background."""
    return InputFormat(channels, height, width, "bilinear", None, RED)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_turns_as_pillow_does(orientation: int, kind: str) -> None:
    file = encode(colourful(12, 8), kind, exif=b"Exif\0\0" + exif(orientation))
    with Image.open(io.BytesIO(file)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    found = pixels(file, of_size(*expected.shape[1::-1]))
    np.testing.assert_array_equal(found, expected)


def test_decode_broken_exif_is_skipped() -> None:
    """A fraction over zero follows the orientation, which still turns the image."""
    plain = encode(colourful(12, 8), "JPEG")
    turned = np.rot90(pixels(plain, of_size(12, 8)), -1)
    file = encode(colourful(12, 8), "JPEG", exif=BAD_RATIONAL)
    np.testing.assert_array_equal(pixels(file, of_size(8, 12)), turned)
    for content in (b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0" + b"\xff" * 99):
        file = add_segment(plain, 0xE1, content)
        np.testing.assert_array_equal(pixels(file, of_size(8, 12)), pixels(plain, of_size(8, 12)))


def test_decode_png_metadata_are_skipped() -> None:
    """Metadata of any kind and size, also broken ones, change nothing."""
    image = colourful(10, 10)
    plain = encode(image)
    text = PngInfo()
    text.add_text("Comment", "x" * 2_000_000)
    text.add_text("Compressed", "x" * 5_000_000, zip=True)
    text.add_itxt("XML:com.adobe.xmp", "y" * 300_000)
    files = [
        encode(image, pnginfo=text, icc_profile=bytes(1_500_000)),
        add_chunks(plain, *(chunk(b"tEXt", b"a\0b") for _ in range(2_000))),
        add_chunks(plain, chunk(b"zTXt", b"broken"), chunk(b"iCCP", b"x"), chunk(b"pHYs", b"")),
        add_chunks(plain, chunk(b"tEXt", b"wrong check")[:-1] + b"\0"),
        add_chunks(plain, chunk(b"acTL", b"\0\0\x07\xd0\0\0\0\0"), chunk(b"fcTL", bytes(26))),
        encode(image, save_all=True, append_images=[image.rotate(90 * i) for i in range(1, 20)]),
        plain + bytes(1000),
        plain[:-12],  # without the last chunk
        plain[:-12] + chunk(b"tEXt", bytes(99))[:50],  # ends within a chunk after the pixels
    ]
    for file in files:
        np.testing.assert_array_equal(pixels(file, of_size(10, 10)), np.asarray(image))


def test_decode_jpeg_metadata_are_skipped() -> None:
    plain = encode(colourful(10, 10), "JPEG")
    profile = encode(colourful(10, 10), "JPEG", icc_profile=bytes(1_500_000))
    files = [profile, plain + b"\0" * 1000, plain + plain]
    for code, content in ((0xE1, b"http://ns.adobe.com/xap/1.0/\0<x"), (0xE2, b"MPF\0broken")):
        files.append(add_segment(plain, code, content))
    files.append(add_segment(plain, 0xED, b"Photoshop 3.0\0broken"))
    files.append(plain[:2] + b"\xff\xfe\0\4zz" * 1000 + plain[2:])
    for file in files:
        np.testing.assert_array_equal(pixels(file, of_size(5, 5)), pixels(plain, of_size(5, 5)))


TRANSPARENT = {
    "grey 1 bit": lambda hidden: png(
        (2, 1), 1, 0, bytes((0, 0x40 if hidden else 0x80)), chunk(b"tRNS", bytes((0, hidden > 0)))
    ),
    "grey 2 bits": lambda hidden: png(
        (2, 1), 2, 0, bytes((0, 0x80 | hidden >> 6 << 4)), chunk(b"tRNS", bytes((0, hidden >> 6)))
    ),
    "grey 4 bits": lambda hidden: png(
        (2, 1), 4, 0, bytes((0, 0x90 | hidden >> 4)), chunk(b"tRNS", bytes((0, hidden >> 4)))
    ),
    "grey": lambda hidden: png(
        (2, 1), 8, 0, bytes((0, 9, hidden)), chunk(b"tRNS", bytes((0, hidden)))
    ),
    "grey 16 bits": lambda hidden: png(
        (2, 1), 16, 0, bytes((0, 9, 9, hidden, 1)), chunk(b"tRNS", bytes((hidden, 1)))
    ),
    "colours": lambda hidden: png(
        (2, 1),
        8,
        2,
        bytes((0, 9, 9, 9, hidden, 1, 2)),
        chunk(b"tRNS", bytes((0, hidden, 0, 1, 0, 2))),
    ),
    "colours 16 bits": lambda hidden: png(
        (2, 1),
        16,
        2,
        bytes((0, 9, 9, 9, 9, 9, 9, hidden, 1, hidden, 2, hidden, 3)),
        chunk(b"tRNS", bytes((hidden, 1, hidden, 2, hidden, 3))),
    ),
    "palette": lambda hidden: png(
        (2, 1),
        8,
        3,
        bytes((0, 0, 1)),
        chunk(b"PLTE", bytes((9, 9, 9, hidden, hidden, 3))),
        chunk(b"tRNS", bytes((255, 0))),
    ),
    "grey and alpha": lambda hidden: png((2, 1), 8, 4, bytes((0, 9, 255, hidden, 0))),
    "grey and alpha 16 bits": lambda hidden: png(
        (2, 1), 16, 4, bytes((0, 9, 9, 255, 255, hidden, 1, 0, 0))
    ),
    "colours and alpha": lambda hidden: png(
        (2, 1), 8, 6, bytes((0, 9, 9, 9, 255, hidden, hidden, 1, 0))
    ),
    "interlaced": lambda hidden: png(
        (2, 1), 8, 6, bytes((0, 9, 9, 9, 255, 0, hidden, hidden, 1, 0)), interlaced=True
    ),
    "colours and alpha 16 bits": lambda hidden: png(
        (2, 1), 16, 6, bytes((0, *(9,) * 6, 255, 255, *(hidden,) * 6, 0, 0))
    ),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", TRANSPARENT)
def test_decode_transparent_pixel_is_the_background(kind: str, channels: int) -> None:
    """The second pixel is transparent: its hidden colour has no effect, whatever it is."""
    target = InputFormat(channels, 1, 2, "bilinear", None, RED)
    for hidden in (0, 100, 255):
        found = pixels(TRANSPARENT[kind](hidden), target)
        assert found[0, 1].tolist() == list(RED[:channels])
        assert found[0, 0].tolist() != found[0, 1].tolist()


def test_decode_half_transparent_pixel_is_blended() -> None:
    found = pixels(png((1, 1), 8, 6, bytes((0, 0, 0, 200, 128))), of_size(1, 1))
    np.testing.assert_allclose(found[0, 0], [100, 0, 100], atol=1)


@pytest.mark.parametrize(
    ("background", "channels", "expected"),
    [
        ("white", 3, (255, 255, 255)),
        ("black", 1, (0, 0, 0)),
        ("mean", 3, (124, 116, 104)),
        ("mean", 1, (124, 124, 124)),
    ],
)
def test_background_colour_is_that_of_the_bundle(
    background: str, channels: int, expected: tuple[int, int, int]
) -> None:
    fields = {"channels": channels, "height": 8, "width": 8, "std": (1.0,) * channels}
    mean = (0.485, 0.456, 0.406)[:channels]
    found = Preprocessing.model_validate(fields | {"mean": mean, "background": background})
    assert found.background_colour == expected


def test_decode_16_bits_keeps_the_high_byte() -> None:
    grey = png((2, 1), 16, 0, bytes((0, 200, 7, 3, 255)))
    assert pixels(grey, of_size(2, 1, channels=1)).ravel().tolist() == [200, 3]
    colours = png((1, 1), 16, 2, bytes((0, 200, 7, 3, 255, 9, 0)))
    assert pixels(colours, of_size(1, 1)).ravel().tolist() == [200, 3, 9]


@pytest.mark.parametrize("progressive", [False, True])
def test_decode_cmyk_and_subsampled_jpeg_keep_colours(progressive: bool) -> None:
    image = Image.new("RGB", (32, 32), (200, 40, 90))
    for options in ({"subsampling": 0}, {"subsampling": 2}, {"quality": 100}):
        file = encode(image, "JPEG", progressive=progressive, **options)
        np.testing.assert_allclose(pixels(file, of_size(4, 4)), [[(200, 40, 90)] * 4] * 4, atol=4)
    cmyk = Image.merge("CMYK", [Image.new("L", (32, 32), value) for value in (55, 215, 165, 0)])
    file = encode(cmyk, "JPEG", progressive=progressive)
    expected = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))[0, 0]
    np.testing.assert_allclose(pixels(file, of_size(4, 4))[0, 0], expected, atol=4)

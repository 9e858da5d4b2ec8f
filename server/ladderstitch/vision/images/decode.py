"""Decode an image file whose headers have been read, and fit it to a model's input."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

from PIL import Image, ImageMath, JpegImagePlugin, PngImagePlugin

from ladderstitch.vision.images.formats import PNG_SIGNATURE, EncodedImage, ImageRejected

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The turn that makes an image of each EXIF orientation upright."""
Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class InputFormat:
    """What a model's input is made from: uint8 pixels [height, width, channels].

    `background` is the colour in RGB behind transparent pixels, `crop` the side of the centred
    square that is kept, as a share of the shorter side, or None for the whole image.
    """

    channels: int
    height: int
    width: int
    resize: str
    crop: float | None
    background: Colour

    @property
    def mode(self) -> str:
        """Pillow's name of the colours."""
        return "L" if self.channels == 1 else "RGB"


def decode(image: EncodedImage, target: InputFormat) -> bytes:
    """Return the pixels [height, width, channels] in uint8 of one image, upright.

    Raises `ImageRejected` if the file is broken, or if the process lacks memory for it. Pillow
    raises errors of many classes for broken files, also ones that it does not document.
    """
    try:
        loaded = _load(image)
        if image.orientation in TURNS:
            loaded = loaded.transpose(TURNS[image.orientation])
        return fit(flatten(loaded, target), target).tobytes()
    except MemoryError as error:
        size = f"{image.width} x {image.height}"
        raise ImageRejected(
            f"expected an image that fits the memory for decoding, got {size} pixels"
        ) from error
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ImageRejected(f"expected a readable image: {reason}") from error


def fit(
    image: Image.Image, target: InputFormat, box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    """Return the part of the image in `box` in the model's size; by default what `crop` keeps."""
    if box is None and target.crop is not None:
        box = centred_square(image.size, target.crop)
    size = (target.width, target.height)
    if image.size == size and box is None:
        return image
    return image.resize(size, Image.Resampling[target.resize.upper()], box)


def centred_square(size: tuple[int, int], share: float) -> tuple[float, float, float, float]:
    """Return the left, upper, right and lower edges in pixels of the centred square.

    Its side is `share` times the shorter side of the image, whose `size` is (width, height).
    """
    side = share * min(size)
    left, upper = (size[0] - side) / 2, (size[1] - side) / 2
    return left, upper, left + side, upper + side


def flatten(image: Image.Image, target: InputFormat) -> Image.Image:
    """Return the image in the model's colours, with its background behind transparent pixels."""
    image.load()  # the palette, without which transparency is not known
    opaque = _scale_16_bits(image) if image.mode.startswith("I") else image
    if not image.has_transparency_data:
        return opaque.convert(target.mode)
    layer = _with_alpha(image, opaque)
    background = target.background[: target.channels]
    canvas = Image.new(target.mode, image.size, background)
    canvas.paste(layer, mask=layer)
    return canvas


def _scale_16_bits(image: Image.Image) -> Image.Image:
    """Return a grey image of 16 bits in 8 bits."""
    scaled = image.point(lambda value: value * (1 / 256)).convert("L")
    scaled.info.pop("transparency", None)
    return scaled


def _with_alpha(image: Image.Image, opaque: Image.Image) -> Image.Image:
    """Return the image with an alpha channel; `opaque` is the same image in 8 bits per channel."""
    if opaque is image:
        return image if image.mode == "RGBA" else image.convert("RGBA")
    layer, key = opaque.convert("RGBA"), image.info["transparency"]
    visible = ImageMath.lambda_eval(
        lambda names: names["convert"]((names["image"] != key) * 255, "L"), image=image.convert("I")
    )
    layer.putalpha(visible)
    return layer


def _load(image: EncodedImage) -> Image.Image:
    file = io.BytesIO(image.data)
    if not image.data.startswith(PNG_SIGNATURE):
        jpeg = JpegImagePlugin.JpegImageFile(file)
        jpeg.load()
        return jpeg
    png = PngImagePlugin.PngImageFile(file)
    png.load()
    _correct_transparency(png, *struct.unpack_from("BB", image.data, 24))
    return png


def _correct_transparency(image: Image.Image, depth: int, colour_type: int) -> None:
    """Scale the transparent colour of a PNG file to 8 bits, as Pillow scales the pixels.

    Pillow itself scales that of 1 bit only.
    """
    key = image.info.get("transparency")
    if colour_type == 0 and depth in (2, 4) and isinstance(key, int):
        image.info["transparency"] = key * 255 // (2**depth - 1)
    elif colour_type == 2 and depth == 16 and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)

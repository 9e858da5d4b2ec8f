"""Convert request inputs (raw tensors, PNG and JPEG files) to model inputs."""

from __future__ import annotations

import asyncio
import io
import math
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ladderstitch.errors import InvalidArgument
from ladderstitch.scheduling.requests import Pixels
from ladderstitch.security.listen_config import MAX_IMAGE_PIXELS
from ladderstitch.vision.bundle import Preprocessing

MAX_INLINE_PIXELS = 256 * 256
"""Larger images are decoded in a thread, so that they do not block the event loop."""
ITEM_BYTES = {"UINT8": 1, "FP32": 4}

_decoders = ThreadPoolExecutor(2, thread_name_prefix="decode")


class ImageReader:
    """The preprocessing of one model.

    `max_pixels` is checked against a file's header, before anything is decoded.
    """

    def __init__(self, preprocessing: Preprocessing, max_pixels: int = MAX_IMAGE_PIXELS) -> None:
        self.max_pixels = max_pixels
        self.shape = (preprocessing.channels, preprocessing.height, preprocessing.width)
        self.mode = "L" if preprocessing.channels == 1 else "RGB"
        self.resample = Image.Resampling[preprocessing.resize.upper()]
        self.crop = preprocessing.crop
        std = np.asarray(preprocessing.std, np.float32)
        mean = np.asarray(preprocessing.mean, np.float32)
        self.scale = (1 / (255 * std)).reshape(-1, 1, 1)
        self.shift = (-mean / std).reshape(-1, 1, 1)

    def normalise(self, pixels: NDArray[np.uint8]) -> Pixels:
        """Return (pixel / 255 - mean) / std in float32 of uint8 pixels [B, C, H, W]."""
        return pixels * self.scale + self.shift

    def read_tensor(self, field: str, datatype: str, shape: Sequence[int], data: bytes) -> Pixels:
        """Return model inputs [B, C, H, W] from raw little-endian bytes.

        UINT8 data are pixels in 0 .. 255; FP32 data are already preprocessed. Raises
        `InvalidArgument` that names the wrong part of `field`.
        """
        if datatype not in ITEM_BYTES:
            raise InvalidArgument(f"{field}.datatype", f"expected UINT8 or FP32, got {datatype!r}")
        if len(shape) != 4 or tuple(shape[1:]) != self.shape or shape[0] < 1:
            expected = ("N >= 1", *self.shape)
            raise InvalidArgument(f"{field}.shape", f"expected {list(expected)}, got {list(shape)}")
        expected_bytes = math.prod(shape) * ITEM_BYTES[datatype]
        if len(data) != expected_bytes:
            raise InvalidArgument(
                f"{field}.data",
                f"expected {expected_bytes} bytes for {datatype} {list(shape)}, got {len(data)}",
            )
        if datatype == "UINT8":
            return self.normalise(np.frombuffer(data, np.uint8).reshape(shape))
        return self.check_finite(field, np.frombuffer(data, "<f4").reshape(shape))

    def check_finite(self, field: str, values: Pixels) -> Pixels:
        """Return `values`; raises `InvalidArgument` if one is NaN or infinite."""
        if not np.isfinite(values).all():
            raise InvalidArgument(f"{field}.data", "expected finite numbers, got NaN or infinity")
        return values

    async def read_encoded(self, field: str, data: bytes) -> Pixels:
        """Return one model input [1, C, H, W] from the bytes of a PNG or JPEG file.

        Raises `InvalidArgument` for a file of another format, a broken file, and a file of more
        than `max_pixels` pixels.
        """
        if not data:
            raise InvalidArgument(field, "expected the bytes of a PNG or JPEG file, got none")
        try:
            with warnings.catch_warnings():
                # Pillow's own limit is a global variable; `max_pixels` is checked below.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            raise InvalidArgument(
                field, f"expected a PNG or JPEG file: {_first_line(error)}"
            ) from error
        except Image.DecompressionBombError as error:
            raise InvalidArgument(
                field, f"expected at most {self.max_pixels} pixels: {error}"
            ) from error
        pixels = image.width * image.height
        if pixels > self.max_pixels:
            raise InvalidArgument(
                field,
                f"expected at most {self.max_pixels} pixels, got {image.width} x {image.height}",
            )
        if pixels <= MAX_INLINE_PIXELS:
            return self._decode(field, image)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(_decoders, self._decode, field, image)

    def _decode(self, field: str, image: Image.Image) -> Pixels:
        """Decode, rotate as EXIF says, convert, crop, resize and normalise one image."""
        _, height, width = self.shape
        try:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits per channel
                upright = upright.point(lambda value: value * (1 / 256))
            converted = upright.convert(self.mode)
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise InvalidArgument(
                field, f"expected a readable image: {_first_line(error)}"
            ) from error
        box = None if self.crop is None else centred_square(converted.size, self.crop)
        if converted.size != (width, height) or box is not None:
            converted = converted.resize((width, height), self.resample, box)
        array = np.asarray(converted, np.uint8).reshape(height, width, -1)
        return self.normalise(np.ascontiguousarray(array.transpose(2, 0, 1))[None])


def centred_square(size: tuple[int, int], share: float) -> tuple[float, float, float, float]:
    """Return the left, upper, right and lower edges in pixels of the centred square.

    Its side is `share` times the shorter side of the image, whose `size` is (width, height).
    """
    side = share * min(size)
    left, upper = (size[0] - side) / 2, (size[1] - side) / 2
    return left, upper, left + side, upper + side


def _first_line(error: Exception) -> str:
    """Return the first line of the error's text, at most 200 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]

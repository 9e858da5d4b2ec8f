"""Convert request inputs (raw tensors, PNG and JPEG files) to model inputs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ladderstitch.errors import InvalidArgument
from ladderstitch.scheduling.requests import Pixels
from ladderstitch.security.listen_config import (
    IMAGE_DECODE_TIMEOUT_S,
    IMAGE_DECODERS,
    MAX_IMAGE_MB,
    MAX_IMAGE_PIXELS,
)
from ladderstitch.vision.bundle import Preprocessing
from ladderstitch.vision.images.decode import InputFormat, decode
from ladderstitch.vision.images.formats import ImageRejected, TooManySegments, read_headers
from ladderstitch.vision.images.pool import DecoderPool
from ladderstitch.vision.tensor_inputs import NonFiniteInputs, TensorReader

MAX_INLINE_COST = 1 << 17
"""Images that cost more, over about 1 ms, are decoded in processes, not on the event loop."""
MAX_INLINE_BYTES, MAX_INLINE_SEGMENTS = 32_768, 64
"""Limits of the headers that are read on the event loop."""


class ImageReader(TensorReader):
    """The preprocessing of one model.

    `max_pixels` and `max_bytes` are limits of an encoded image, `decoders` is the number of
    processes that decode concurrently for each range of costs, and `decode_timeout_s` the limit of
    one image. Processes start when they are first needed; `close` ends them.
    """

    shape: tuple[int, int, int]

    def __init__(
        self,
        preprocessing: Preprocessing,
        max_pixels: int = MAX_IMAGE_PIXELS,
        *,
        max_bytes: int = MAX_IMAGE_MB << 20,
        decoders: int = IMAGE_DECODERS,
        decode_timeout_s: float = IMAGE_DECODE_TIMEOUT_S,
        non_finite: NonFiniteInputs = "compute",
    ) -> None:
        self.max_pixels, self.max_bytes = max_pixels, max_bytes
        shape = (preprocessing.channels, preprocessing.height, preprocessing.width)
        super().__init__(shape, non_finite, self.normalise)
        self.target = InputFormat(
            channels=preprocessing.channels,
            height=preprocessing.height,
            width=preprocessing.width,
            resize=preprocessing.resize,
            crop=preprocessing.crop,
            background=preprocessing.background_colour,
        )
        std = np.asarray(preprocessing.std, np.float32)
        mean = np.asarray(preprocessing.mean, np.float32)
        self.scale = (1 / (255 * std)).reshape(-1, 1, 1)
        self.shift = (-mean / std).reshape(-1, 1, 1)
        self._pool = DecoderPool(self.target, max_pixels, decoders, decode_timeout_s)

    def normalise(self, pixels: NDArray[np.uint8]) -> Pixels:
        """Return (pixel / 255 - mean) / std in float32 of uint8 pixels [B, C, H, W]."""
        return pixels * self.scale + self.shift

    async def read_encoded(self, field: str, data: bytes) -> Pixels:
        """Return one model input [1, C, H, W] from the bytes of a PNG or JPEG file.

        Cheap images are decoded at once, others in processes. Raises `InvalidArgument` for a file
        of another format, a broken file, and a file that exceeds a limit, and `Overloaded` if too
        many images wait.
        """
        if not data:
            raise InvalidArgument(field, "expected the bytes of a PNG or JPEG file, got none")
        self.check_bytes(field, len(data))
        try:
            pixels = self._decode_cheap(data)
            if pixels is None:
                pixels = await self._pool.decode(data, max(len(data), MAX_INLINE_COST))
        except ImageRejected as error:
            raise InvalidArgument(field, str(error)) from error
        channels, height, width = self.shape
        array = np.frombuffer(pixels, np.uint8).reshape(height, width, channels)
        return self.normalise(np.ascontiguousarray(array.transpose(2, 0, 1))[None])

    def check_bytes(self, field: str, num_bytes: int) -> None:
        """Raise `InvalidArgument` if an encoded image of `num_bytes` is larger than the limit."""
        if num_bytes > self.max_bytes:
            raise InvalidArgument(
                field, f"expected at most {self.max_bytes} bytes, got {num_bytes}"
            )

    def _decode_cheap(self, data: bytes) -> bytes | None:
        """Return the pixels of an image whose headers bound the cost, or None for other images."""
        if len(data) > MAX_INLINE_BYTES:
            return None
        try:
            image = read_headers(data, self.max_pixels, MAX_INLINE_SEGMENTS)
        except TooManySegments:
            return None
        return decode(image, self.target) if image.cost <= MAX_INLINE_COST else None

    def close(self) -> None:
        """End the processes that decode images; no file may be read afterwards."""
        self._pool.close()

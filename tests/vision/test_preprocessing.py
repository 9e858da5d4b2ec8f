"""Tests of the preprocessing of images of any size."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from ladderstitch.vision.bundle import Preprocessing
from ladderstitch.vision.images.decode import centred_square
from ladderstitch.vision.preprocessing import ImageReader


def test_centred_square_returns_edges() -> None:
    assert centred_square((200, 100), 0.5) == (75, 25, 125, 75)
    assert centred_square((30, 30), 1.0) == (0, 0, 30, 30)


async def test_read_encoded_with_crop_removes_edges() -> None:
    """An image with red edges and a grey middle has no red in the cropped input."""
    pixels = np.full((60, 120, 3), 127, np.uint8)
    pixels[:, :30] = pixels[:, 90:] = (255, 0, 0)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    sizes = {"channels": 3, "height": 16, "width": 16, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    cropped = Preprocessing.model_validate(sizes | {"crop": 0.875})
    stretched = Preprocessing.model_validate(sizes)
    middle = await ImageReader(cropped, 10_000).read_encoded("image", file.getvalue())
    whole = await ImageReader(stretched, 10_000).read_encoded("image", file.getvalue())
    assert np.allclose(middle, 127 / 255, atol=1e-3)
    assert whole[0, 0, 8, 0] > 0.9

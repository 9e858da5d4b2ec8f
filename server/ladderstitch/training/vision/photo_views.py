"""Views of photographs: what a stitching layer is fitted on, and agreement is measured on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ladderstitch.errors import DataError
from ladderstitch.scheduling.requests import Pixels
from ladderstitch.vision.bundle import Preprocessing
from ladderstitch.vision.preprocessing import ImageReader, centred_square

SUFFIXES = (".png", ".jpg", ".jpeg")


def find_photographs(folder: Path) -> list[Path]:
    """Pictures below a folder, in order of their names; raises `DataError` if there are none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise DataError(f"{folder}: expected PNG or JPEG files, found none")
    return found


def centred_views(paths: Iterable[Path], preprocessing: Preprocessing) -> Tensor:
    """[B, C, H, W]: each picture as a server would see it."""
    share = preprocessing.crop or 1.0
    views = []
    for path in paths:
        with Image.open(path) as image:
            views.append(_view(image, centred_square(image.size, share), preprocessing))
    return torch.from_numpy(np.stack(views))


def random_views(
    paths: Sequence[Path], preprocessing: Preprocessing, each: int, seed: int
) -> Tensor:
    """[B, C, H, W]: squares of half the shorter side and more, from all over each picture."""
    rng = np.random.default_rng(seed)
    views = []
    for path in paths:
        with Image.open(path) as image:
            for _ in range(each):
                side = rng.uniform(0.5, 1.0) * min(image.size)
                left = rng.uniform(0, image.width - side)
                upper = rng.uniform(0, image.height - side)
                views.append(_view(image, (left, upper, left + side, upper + side), preprocessing))
    return torch.from_numpy(np.stack(views))


def _view(
    image: Image.Image, box: tuple[float, float, float, float], preprocessing: Preprocessing
) -> Pixels:
    reader = ImageReader(preprocessing, max_pixels=image.width * image.height)
    size = (preprocessing.width, preprocessing.height)
    picture = image.convert(reader.mode).resize(size, reader.resample, box)
    array = np.asarray(picture, np.uint8).reshape(*size[::-1], -1)
    view: Pixels = reader.normalise(np.ascontiguousarray(array.transpose(2, 0, 1))[None])[0]
    return view

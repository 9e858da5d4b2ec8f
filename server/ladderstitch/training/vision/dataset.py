"""Images for training and calibration: IDX folders (MNIST's format), augmentation, photographs."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ladderstitch.errors import DataError
from ladderstitch.scheduling.requests import Pixels
from ladderstitch.vision.bundle import Preprocessing
from ladderstitch.vision.images.decode import centred_square, fit, flatten
from ladderstitch.vision.preprocessing import ImageReader


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """N labelled images: `pixels` uint8 [N, C, H, W] and `labels` int64 [N]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, positions: Sequence[int] | slice) -> LabelledImages:
        """Return the images at these positions, in their order."""
        chosen = positions if isinstance(positions, slice) else list(positions)
        return LabelledImages(self.pixels[chosen], self.labels[chosen])


def read_idx(path: Path) -> np.ndarray:
    """Return the uint8 array of a gzipped IDX file; raises `DataError` for any other file."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: expected a gzipped IDX file: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise DataError(f"{path}: expected the IDX header of unsigned bytes, got {raw[:4].hex()}")
    dims = raw[3]
    shape = tuple(np.frombuffer(raw, ">u4", dims, offset=4).tolist())
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * dims)
    if body.size != np.prod(shape):
        raise DataError(f"{path}: expected {shape} from the header, got {body.size} bytes")
    return body.reshape(shape)


def is_idx_folder(source: Path) -> bool:
    """Return whether a folder holds gzipped IDX files."""
    return source.is_dir() and any(source.glob("*-ubyte.gz"))


def load_idx_folder(
    folder: Path, split: str, shape: tuple[int, int, int], num_classes: int
) -> LabelledImages:
    """Return the split `train` or `t10k` of a folder in the layout of MNIST and Fashion-MNIST.

    `shape` [C, H, W] and `num_classes` are the model's. Raises `DataError` if a file is missing or
    broken, if the numbers of images and labels differ, or if they do not fit the model: images are
    neither resized nor turned from grey to colours.
    """
    file = folder / f"{split}-images-idx3-ubyte.gz"
    pixels = read_idx(file)
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    if pixels.ndim != 3 or (1, *pixels.shape[1:]) != shape:
        raise DataError(
            f"{file}: expected grey images [N, height, width] for a model that takes "
            f"{list(shape)}, got {list(pixels.shape)}; a folder of image files is converted"
        )
    if labels.shape != pixels.shape[:1]:
        raise DataError(
            f"{folder}: expected {len(pixels)} labels for {split}, got {list(labels.shape)}"
        )
    if not len(labels) or labels.max() >= num_classes:
        got = f"{labels.max()}" if len(labels) else "no image"
        raise DataError(f"{folder}: expected labels below {num_classes} for {split}, got {got}")
    return LabelledImages(
        torch.from_numpy(pixels.copy()).unsqueeze(1),
        torch.from_numpy(labels.astype(np.int64)),
    )


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return (pixel / 255 - mean) / std per channel, in float32, of uint8 pixels [B, C, H, W]."""
    centre = torch.tensor(mean).view(1, -1, 1, 1)
    spread = torch.tensor(std).view(1, -1, 1, 1)
    return (pixels.float() / 255 - centre) / spread


def augment(images: Tensor, rng: torch.Generator, *, shift: int, erase: int) -> Tensor:
    """Return the images [B, C, H, W] with random flips, shifts and erased squares.

    Each image is flipped horizontally with probability 0.5 and shifted by up to `shift` pixels.
    With probability 0.5, one square of about `erase` pixels per side is set to 0. The images are
    already normalised, so that 0 is the mean.
    """
    batch, _, height, width = images.shape
    flip = torch.rand(batch, generator=rng) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, (shift, shift, shift, shift), value=float(images.min()))
    top = torch.randint(2 * shift + 1, (batch, 1), generator=rng)
    left = torch.randint(2 * shift + 1, (batch, 1), generator=rng)
    rows, columns = top + torch.arange(height), left + torch.arange(width)  # [B, H], [B, W]
    which = torch.arange(batch)[:, None, None]
    images = padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if erase:
        y = torch.randint(height, (batch, 1), generator=rng) - torch.arange(height)  # [B, H]
        x = torch.randint(width, (batch, 1), generator=rng) - torch.arange(width)  # [B, W]
        hidden = (y.abs() <= erase // 2)[:, :, None] & (x.abs() <= erase // 2)[:, None, :]
        hidden &= (torch.rand(batch, generator=rng) < 0.5)[:, None, None]
        images = images.masked_fill(hidden[:, None], 0.0)
    return images


SUFFIXES = (".png", ".jpg", ".jpeg")


def find_photographs(folder: Path) -> list[Path]:
    """Return the image files below a folder by name; raises `DataError` if there are none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"{folder}: expected PNG or JPEG files, got none")
    return files


def centred_views(paths: Iterable[Path], preprocessing: Preprocessing) -> Tensor:
    """Return one model input per image, [B, C, H, W], preprocessed like in the server."""
    share = preprocessing.crop or 1.0
    views = []
    for path in paths:
        with Image.open(path) as image:
            views.append(make_view(image, centred_square(image.size, share), preprocessing))
    return torch.from_numpy(np.stack(views))


def random_views(
    paths: Sequence[Path], preprocessing: Preprocessing, views_per_image: int, seed: int
) -> Tensor:
    """Return model inputs [B, C, H, W] from random squares of each image.

    A square's side is 0.5 to 1 times the shorter side; its position is uniform.
    """
    rng = np.random.default_rng(seed)
    views = []
    for path in paths:
        with Image.open(path) as image:
            for _ in range(views_per_image):
                side = rng.uniform(0.5, 1.0) * min(image.size)
                left = rng.uniform(0, image.width - side)
                upper = rng.uniform(0, image.height - side)
                views.append(
                    make_view(image, (left, upper, left + side, upper + side), preprocessing)
                )
    return torch.from_numpy(np.stack(views))


def make_view(
    image: Image.Image, box: tuple[float, float, float, float], preprocessing: Preprocessing
) -> Pixels:
    """Return the model input [C, H, W] of the part of the image in the box."""
    reader = ImageReader(preprocessing)
    view: Pixels = reader.normalise(view_pixels(image, box, reader)[None])[0]
    return view


def view_pixels(
    image: Image.Image, box: tuple[float, float, float, float], reader: ImageReader
) -> NDArray[np.uint8]:
    """Return uint8 pixels [C, H, W] of the part of the image in the box, as the model takes it."""
    _, height, width = reader.shape
    resized = fit(flatten(image, reader.target), reader.target, box)
    array = np.asarray(resized, np.uint8).reshape(height, width, -1)
    return np.ascontiguousarray(array.transpose(2, 0, 1))

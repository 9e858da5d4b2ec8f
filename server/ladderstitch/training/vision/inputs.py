"""Inputs of a model and their targets as files: images or .npy tensors; masks, arrays or texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ladderstitch.errors import DataError
from ladderstitch.scheduling.requests import Pixels
from ladderstitch.training.vision.dataset import normalise
from ladderstitch.training.vision.image_files import (
    ImageFiles,
    batches_of_views,
    find_images,
    load_pixels,
    read_rows,
)
from ladderstitch.vision.bundle import Preprocessing
from ladderstitch.vision.images.decode import centred_square

TARGET_SUFFIXES = (".png", ".npy")


@dataclass(frozen=True, slots=True)
class InputKind:
    """What a model takes: images of this preprocessing, or without any, tensors of `shape`."""

    shape: tuple[int, ...]
    preprocessing: Preprocessing | None

    def find(self, folder: Path) -> ImageFiles:
        """Return the files of inputs below a folder; raises `DataError` if there are none."""
        if self.preprocessing is not None:
            return find_images(folder)
        paths = sorted(folder.rglob("*.npy")) if folder.is_dir() else []
        if not paths:
            raise DataError(f"{folder}: expected a folder of .npy files {list(self.shape)}")
        return ImageFiles(tuple(paths))

    def views_of(
        self, files: ImageFiles, *, views: int, batch_size: int, seed: int
    ) -> tuple[int, Iterator[Pixels]]:
        """Return the number of inputs, and batches of them: `views` of each image.

        There is one view of a tensor. Raises `DataError` that names a file which does not fit.
        """
        if self.preprocessing is None:
            return len(files), self.batches(files, batch_size)
        batches = batches_of_views(
            files, self.preprocessing, views=views, batch_size=batch_size, seed=seed
        )
        return len(files) * views, batches

    def batches(self, files: ImageFiles, batch_size: int) -> Iterator[Pixels]:
        """Yield batches of inputs as a server reads them; raises `DataError` as `views_of` does."""
        for start in range(0, len(files), batch_size):
            part = files.select(range(start, min(start + batch_size, len(files))))
            if self.preprocessing is None:
                yield np.stack([self._read_tensor(path) for path in part.paths])
            else:
                scaling = self.preprocessing
                yield normalise(load_pixels(part, scaling), scaling.mean, scaling.std).numpy()

    def _read_tensor(self, path: Path) -> NDArray[np.float32]:
        array = read_array(path)
        if array.shape not in (self.shape, (1, *self.shape)):
            raise DataError(f"{path}: expected {list(self.shape)}, got {list(array.shape)}")
        if not np.isfinite(array).all():
            raise DataError(f"{path}: expected finite numbers, got NaN or infinity")
        return array.reshape(self.shape).astype(np.float32)


def read_array(path: Path) -> NDArray[Any]:
    """Return the numbers in a .npy file; raises `DataError` for anything else."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: expected a .npy file: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise DataError(f"{path}: expected a .npy file of numbers")
    return np.asarray(array)


@dataclass(frozen=True, slots=True)
class Target:
    """The target of one input: the file `value`, or `value` itself, as text."""

    source: Path
    value: str | Path

    def read(self) -> Any:
        """Return the array of a .npy file, the pixels of a PNG file, or the text."""
        if not isinstance(self.value, Path):
            return self.value
        if self.value.suffix == ".npy":
            return read_array(self.value)
        with open_mask(self.value) as image:
            return np.asarray(image)

    def read_classes(self, size: tuple[int, int], crop: float | None) -> NDArray[np.int64]:
        """Return the class of each pixel of a mask, as an output of `size` [h, w] sees the image.

        The mask is cropped and stretched as the image is, by nearest neighbours. Raises `DataError`
        for a file that is no mask of the image.
        """
        if not isinstance(self.value, Path):
            raise DataError(f"{self.source}: expected a PNG mask, got {str(self.value)[:80]!r}")
        if self.value.suffix == ".npy":
            return self._check_mask(read_array(self.value), size)
        with open_mask(self.value) as mask:
            if self.source.suffix == ".npy":
                return self._check_mask(np.asarray(mask), size)
            with open_mask(self.source) as image:
                if image.size != mask.size:
                    raise DataError(
                        f"{self.value}: expected {image.size} pixels as in {self.source.name}, "
                        f"got {mask.size}"
                    )
            box = None if crop is None else centred_square(mask.size, crop)
            resized = mask.resize(size[::-1], Image.Resampling.NEAREST, box=box)
            return self._check_mask(np.asarray(resized), size)

    def _check_mask(self, classes: NDArray[Any], size: tuple[int, int]) -> NDArray[np.int64]:
        if classes.shape != size or classes.dtype.kind not in "biu":
            raise DataError(
                f"{self.value}: expected one class per pixel {list(size)}, got {classes.dtype} "
                f"{list(classes.shape)}"
            )
        return classes.astype(np.int64)


def open_mask(path: Path) -> Image.Image:
    """Return an image that is read lazily; raises `DataError` for another file."""
    try:
        image = Image.open(path)
        image.load()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: expected an image: {error}") from error
    return image


def find_targets(files: ImageFiles, folder: Path) -> list[Target]:
    """Return the target of each input: the PNG or .npy file of the same name in a folder.

    Raises `DataError` if there is none.
    """
    known: dict[str, Path] = {}
    if folder.is_dir():
        known = {p.stem: p for p in sorted(folder.rglob("*")) if p.suffix in TARGET_SUFFIXES}
    missing = [path.stem for path in files.paths if path.stem not in known]
    if missing:
        raise DataError(
            f"{folder}: expected a PNG or .npy file for each input, got none for {missing[:3]}"
        )
    return [Target(path, known[path.stem]) for path in files.paths]


def read_pairs(source: Path) -> tuple[ImageFiles, list[Target]]:
    """Return inputs and their targets from the lines `path,target` of a CSV file.

    Paths are relative to the file; targets are PNG or .npy files, or texts. A first line whose
    first word is `path` is skipped.
    """
    rows: Sequence[tuple[str, str]] = read_rows(source)
    if rows[0][0].lower() == "path":
        rows = rows[1:]
    if not rows:
        raise DataError(f"{source}: expected lines `path,target`, got none")
    paths = tuple(source.parent / path for path, _ in rows)
    targets = [
        Target(path, source.parent / value if value.endswith(TARGET_SUFFIXES) else value)
        for path, (_, value) in zip(paths, rows, strict=True)
    ]
    return ImageFiles(paths), targets

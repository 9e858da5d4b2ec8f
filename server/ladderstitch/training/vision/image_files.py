"""Data sets of the user: folders with one subfolder per class, CSV files, folders of images."""

from __future__ import annotations

import csv
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ladderstitch.errors import DataError
from ladderstitch.scheduling.requests import Pixels
from ladderstitch.security.listen_config import MAX_IMAGE_PIXELS
from ladderstitch.training.vision.dataset import LabelledImages, find_photographs, view_pixels
from ladderstitch.vision.bundle import Preprocessing
from ladderstitch.vision.images.decode import decode
from ladderstitch.vision.images.formats import ImageRejected, read_headers
from ladderstitch.vision.preprocessing import ImageReader

MAX_CSV_BYTES = 256 << 20
MAX_LISTED = 10
"""Names in an error message."""
SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
"""Names of subfolders that are parts of a data set, not classes."""


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """N image files, and the positions of their labels in a list of labels, or no labels."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, positions: Sequence[int]) -> ImageFiles:
        """Return the files at these positions, in their order."""
        labels = None if self.labels is None else tuple(self.labels[i] for i in positions)
        return ImageFiles(tuple(self.paths[i] for i in positions), labels)

    def split(self, share: float, seed: int) -> tuple[ImageFiles, ImageFiles]:
        """Return shuffled files, and a `share` of them from 0 to 1 that are held out.

        With labels, the share is that of every class. The split depends on the seed and on the
        files only. Both parts have a file if there are two.
        """
        labels = (0,) * len(self) if self.labels is None else self.labels
        kept, held_out = split_positions(labels, share, seed)
        return self.select(kept), self.select(held_out)


def split_positions(
    labels: Sequence[int], share: float, seed: int, *, keep_classes: bool = False
) -> tuple[list[int], list[int]]:
    """Return shuffled positions, and a `share` of those of every label that are held out.

    Both parts have a position if there are two. With `keep_classes`, no label is held out
    altogether.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for position, label in enumerate(labels):
        groups[label].append(position)
    rng = np.random.default_rng(seed)
    kept: list[int] = []
    held_out: list[int] = []
    owed = 0.0
    for label in sorted(groups):
        shuffled = [groups[label][i] for i in rng.permutation(len(groups[label]))]
        owed += share * len(shuffled)
        count = min(round(owed), len(shuffled) - keep_classes)
        owed -= count
        held_out += shuffled[:count]
        kept += shuffled[count:]
    for empty, full in ((held_out, kept), (kept, held_out)):
        if not empty and len(full) > 1:
            empty.append(full.pop())
    rng.shuffle(kept)
    rng.shuffle(held_out)
    return kept, held_out


def find_images(folder: Path) -> ImageFiles:
    """Return the PNG and JPEG files below a folder, without labels; `DataError` if none exist."""
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of images, got none")
    return ImageFiles(tuple(find_photographs(folder)))


def find_classes(source: Path) -> tuple[str, ...]:
    """Return the names of the classes of a folder or CSV file as labels, in order.

    Numbers are ordered by their value. Raises `DataError` unless there are two, and for a folder
    whose subfolders are splits.
    """
    if source.is_dir():
        names = {folder.name for folder in _class_folders(source)}
        if len(names) > 1 and names <= SPLITS:
            raise DataError(
                f"{source}: expected one subfolder per class, got the splits {sorted(names)}; "
                "name one of them"
            )
    else:
        names = {label for _, label in read_rows(source)}
    if len(names) < 2:
        raise DataError(f"{source}: expected at least two classes, got {sorted(names)}")
    numbers = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))


def _class_folders(source: Path) -> list[Path]:
    """Return the subfolders by name, without hidden ones; raises `DataError` if none exist."""
    folders = sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise DataError(f"{source}: expected one subfolder per class, got no subfolder")
    return folders


def find_labelled(source: Path, labels: Sequence[str]) -> ImageFiles:
    """Return the images of a folder with one subfolder per class, or of a CSV file.

    Lines of a CSV file are `path,label`, with paths relative to the file; a first line of these two
    words is skipped. Names of classes are the model's `labels` or positions in them. Subfolders of
    other names stand for the labels in sorted order if there are equally many. Raises `DataError`
    for anything else.
    """
    if source.is_dir():
        folders = _class_folders(source)
        positions = _match_labels([folder.name for folder in folders], labels, source)
        found = [(p, folder) for folder in folders for p in find_photographs(folder)]
        return ImageFiles(
            tuple(path for path, _ in found), tuple(positions[folder.name] for _, folder in found)
        )
    rows = read_rows(source)
    positions = _match_labels(sorted({label for _, label in rows}), labels, source, ordered=False)
    paths = tuple(source.parent / path for path, _ in rows)
    return ImageFiles(paths, tuple(positions[label] for _, label in rows))


def read_rows(source: Path) -> list[tuple[str, str]]:
    """Return path and label of each line of a CSV file."""
    try:
        if source.stat().st_size > MAX_CSV_BYTES:
            raise DataError(f"{source}: expected at most {MAX_CSV_BYTES} bytes")
        with source.open(newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{source}: expected a folder or a CSV file: {error}") from error
    if rows and [cell.strip().lower() for cell in rows[0]] == ["path", "label"]:
        del rows[0]
    if not rows:
        raise DataError(f"{source}: expected lines `path,label`, got none")
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise DataError(
                f"{source}: expected `path,label`, got {len(row)} fields in row {number}"
            )
    return [(row[0].strip(), row[1].strip()) for row in rows]


def _match_labels(
    names: Sequence[str], labels: Sequence[str], source: Path, *, ordered: bool = True
) -> dict[str, int]:
    """Return the position of each class in the model's labels; raises `DataError` if unknown."""
    by_name = {label: position for position, label in enumerate(labels)}
    if all(name in by_name for name in names):
        return {name: by_name[name] for name in names}
    if all(name.isdecimal() and int(name) < len(labels) for name in names):
        return {name: int(name) for name in names}
    if ordered and len(names) == len(labels):
        return {name: position for position, name in enumerate(sorted(names))}
    unknown = [name for name in names if name not in by_name][:MAX_LISTED]
    raise DataError(
        f"{source}: expected the model's {len(labels)} labels, such as {list(labels[:3])}, or "
        f"their positions, got {len(names)} classes with unknown names such as {unknown}"
    )


def load_pixels(files: ImageFiles, preprocessing: Preprocessing) -> Tensor:
    """Return the images as a server decodes them, uint8 [N, C, H, W], in a file that has no name.

    Memory does not grow with their number: the system writes the file to the disk. Raises
    `DataError` that names a file which a server would reject.
    """
    target = ImageReader(preprocessing).target
    shape = (len(files), preprocessing.height, preprocessing.width, preprocessing.channels)
    with tempfile.TemporaryFile() as file:
        pixels = np.memmap(file, np.uint8, "w+", shape=shape)
    for number, path in enumerate(files.paths):
        try:
            image = read_headers(path.read_bytes(), MAX_IMAGE_PIXELS)
            pixels[number] = np.frombuffer(decode(image, target), np.uint8).reshape(shape[1:])
        except (OSError, ImageRejected) as error:
            raise DataError(f"{path}: {error}") from error
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def load_labelled(source: Path, labels: Sequence[str], pre: Preprocessing) -> LabelledImages:
    """Return the labelled images of a folder or CSV file, as `find_labelled` finds them."""
    return read_labelled(find_labelled(source, labels), pre)


def read_labelled(files: ImageFiles, pre: Preprocessing) -> LabelledImages:
    """Return labelled files as images; raises `DataError` for one that cannot be read."""
    assert files.labels is not None
    return LabelledImages(load_pixels(files, pre), torch.tensor(files.labels))


def load_sample(source: Path, count: int, preprocessing: Preprocessing, seed: int) -> Tensor:
    """Return the pixels of at most `count` random images of a folder or CSV file, unlabelled."""
    if source.is_dir():
        files = find_images(source)
    else:
        files = ImageFiles(tuple(source.parent / path for path, _ in read_rows(source)))
    chosen = np.random.default_rng(seed).permutation(len(files))[:count]
    return load_pixels(files.select(sorted(chosen.tolist())), preprocessing)


def load_views(files: ImageFiles, preprocessing: Preprocessing, views: int, seed: int) -> Tensor:
    """Return the pixels of `_views_of` each image, uint8 [N * views, C, H, W]."""
    reader, rng = ImageReader(preprocessing), np.random.default_rng(seed)
    found = [view for path in files.paths for view in _views_of(path, reader, views, rng)]
    return torch.from_numpy(np.stack(found))


def batches_of_views(
    files: ImageFiles, preprocessing: Preprocessing, *, views: int, batch_size: int, seed: int
) -> Iterator[Pixels]:
    """Yield model inputs [B, C, H, W] in float32 from `_views_of` each image.

    Raises `DataError` that names a file which cannot be read.
    """
    reader, rng = ImageReader(preprocessing), np.random.default_rng(seed)
    batch: list[NDArray[np.uint8]] = []
    for path in files.paths:
        batch += _views_of(path, reader, views, rng)
        while len(batch) >= batch_size:
            yield reader.normalise(np.stack(batch[:batch_size]))
            batch = batch[batch_size:]
    if batch:
        yield reader.normalise(np.stack(batch))


def _views_of(
    path: Path, reader: ImageReader, views: int, rng: np.random.Generator
) -> list[NDArray[np.uint8]]:
    """Return the pixels of `views` squares of an image.

    The first one is what a server keeps. The side of a random one is 0.5 to 1 times the shorter
    side. Raises `DataError` if the file cannot be read.
    """
    share = reader.target.crop
    found = []
    try:
        with Image.open(path) as image:
            for number in range(views):
                box = (0.0, 0.0, float(image.width), float(image.height))
                if number or share is not None:
                    side = (rng.uniform(0.5, 1.0) if number else share or 1.0) * min(image.size)
                    left, upper = (
                        (rng.uniform(0, 1) if number else 0.5) * (size - side)
                        for size in image.size
                    )
                    box = (left, upper, left + side, upper + side)
                found.append(view_pixels(image, box, reader))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a PNG or JPEG file: {error}") from error
    return found

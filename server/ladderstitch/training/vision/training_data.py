"""The data of a training run: IDX files or pictures of the user, split, and the recipe for them."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from ladderstitch.errors import ConfigError, DataError
from ladderstitch.training.vision.dataset import LabelledImages, is_idx_folder, load_idx_folder
from ladderstitch.training.vision.image_files import (
    ImageFiles,
    find_classes,
    find_labelled,
    read_labelled,
    split_positions,
)
from ladderstitch.training.vision.recipe import AnyRecipe

R = TypeVar("R", bound=AnyRecipe)
DEFAULT_SHARE, MOST_VALIDATED = 0.2, 2000
"""Share and largest number of the images that are validated, unless a recipe states a number."""
DIGITS = 4
"""Decimal places of a mean and a standard deviation that are measured."""
CHUNK = 256


class RunRecord(BaseModel):
    """What a run folder keeps of its data, in `data.json`; networks trained on them stay valid.

    `digest` identifies the images that were trained on, by their names and sizes or their labels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int
    labels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    split: float | None
    digest: str

    @classmethod
    def load(cls, run: Path) -> RunRecord | None:
        """Return the record of a run, or None; raises `ConfigError` if it cannot be read."""
        path = run / "data.json"
        if not path.exists():
            return None
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, ValidationError) as error:
            raise ConfigError(f"{path}: {error}") from error

    def complete(self, recipe: R) -> R:
        """Return a recipe with the labels, the size, the mean and the deviation of the run."""
        return recipe.completed(
            image_size=self.image_size,
            num_classes=len(self.labels),
            labels=self.labels,
            mean=self.mean,
            std=self.std,
        )


@dataclass(frozen=True, slots=True)
class TrainingData(Generic[R]):
    """Images to train on, others to validate on, and the recipe with what they state.

    `held_out` are the files of the validation images, None for IDX files.
    """

    recipe: R
    train: LabelledImages
    validation: LabelledImages
    held_out: ImageFiles | None
    record: RunRecord

    def enter(self, run: Path) -> None:
        """Create the folder of a run and write its record and `held-out.csv`.

        Raises `ConfigError` if networks in the folder were trained on other images.
        """
        known = RunRecord.load(run)
        if known is not None and known != self.record:
            changed = [n for n in RunRecord.model_fields if getattr(known, n) != self._field(n)]
            raise ConfigError(
                f"run: expected the images that {run} was begun with, got other {changed}; choose "
                "another folder"
            )
        run.mkdir(parents=True, exist_ok=True)
        (run / "data.json").write_text(self.record.model_dump_json(indent=1) + "\n")
        if self.held_out is not None and len(self.held_out):
            self._write_held_out(run / "held-out.csv")

    def _field(self, name: str) -> object:
        return getattr(self.record, name)

    def _write_held_out(self, path: Path) -> None:
        """Write the validation files as a CSV file that `calibrate` takes."""
        assert self.held_out is not None
        assert self.held_out.labels is not None
        labels = self.recipe.labels
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("path", "label"))
            for image, label in zip(self.held_out.paths, self.held_out.labels, strict=True):
                writer.writerow((image.resolve(), labels[label]))


def load_training_data(
    recipe: R, source: Path, *, image_size: int | None = None, split: float | None = None
) -> TrainingData[R]:
    """Return the images of a folder of IDX files, a folder with subfolders, or a CSV file.

    Pictures are decoded as a server does. `image_size` replaces the recipe's; `split` is the share
    of every class that is validated, otherwise the recipe states their number. Raises `ConfigError`
    or `DataError` for what does not fit.
    """
    recipe = recipe.completed(image_size=image_size)
    if is_idx_folder(source):
        shape, labels = recipe.family.inputs.shape, recipe.labels
        images = load_idx_folder(source, "train", shape, len(labels))
        kept, held_out = _split(recipe, images.labels.tolist(), split)
        train, validation = images.select(kept), images.select(held_out)
        return _describe(recipe, train, validation, None, split, train.labels.numpy().tobytes())
    if recipe.data.validation_split == "last":
        raise ConfigError(
            "data.validation_split: expected shuffled for pictures, whose classes follow each other"
        )
    labels = recipe.data.labels or find_classes(source)
    recipe = recipe.completed(num_classes=len(labels), labels=labels)
    files = find_labelled(source, labels)
    assert files.labels is not None
    kept, held_out = _split(recipe, files.labels, split)
    validated = files.select(held_out)
    train = read_labelled(files.select(kept), recipe.preprocessing)
    validation = read_labelled(validated, recipe.preprocessing)
    names = [(p.name, p.stat().st_size, label) for p, label in _pairs(files.select(kept))]
    return _describe(recipe, train, validation, validated, split, repr(names).encode())


def load_run_data(recipe: R, source: Path, run: Path) -> TrainingData[R]:
    """Return the images of a source, with the size and the split that a run was begun with.

    Raises as `load_training_data` does.
    """
    record = RunRecord.load(run)
    if record is None:
        return load_training_data(recipe, source)
    return load_training_data(recipe, source, image_size=record.image_size, split=record.split)


def _pairs(files: ImageFiles) -> list[tuple[Path, int]]:
    assert files.labels is not None
    return list(zip(files.paths, files.labels, strict=True))


def _split(
    recipe: AnyRecipe, labels: list[int] | tuple[int, ...], split: float | None
) -> tuple[list[int], list[int]]:
    """Return the positions of the images to train on, in order, and of those to validate."""
    data, total = recipe.data, len(labels)
    count = data.validation_images
    if count is None:
        count = min(round(DEFAULT_SHARE * total), MOST_VALIDATED)
    if split is not None:
        count = round(split * total)
    if total - count < 2:
        raise DataError(
            f"validation_images: expected at most {total - 2} of {total} images, got {count}; set "
            "it in the recipe, or a share with --split"
        )
    if not count:
        return list(range(total)), []
    if data.validation_split == "last":
        return list(range(total - count)), list(range(total - count, total))
    kept, held_out = split_positions(labels, count / total, recipe.seed, keep_classes=True)
    return sorted(kept), sorted(held_out)


def _describe(
    recipe: R,
    train: LabelledImages,
    validation: LabelledImages,
    held_out: ImageFiles | None,
    split: float | None,
    identity: bytes,
) -> TrainingData[R]:
    """Return the data with the recipe that has a mean and a standard deviation."""
    data = recipe.data
    if data.mean is None or data.std is None:
        mean, std = measure_channels(train.pixels)
        recipe = recipe.completed(mean=data.mean or mean, std=data.std or std)
    inputs = recipe.preprocessing
    record = RunRecord(
        image_size=recipe.family.inputs.image_size,
        labels=recipe.labels,
        mean=inputs.mean,
        std=inputs.std,
        split=split,
        digest=hashlib.sha256(identity).hexdigest()[:16],
    )
    return TrainingData(recipe, train, validation, held_out, record)


def measure_channels(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel of uint8 pixels [N, C, H, W] over 255.

    A standard deviation is at least 0.01, so that images of one colour can be normalised.
    """
    total, squares = torch.zeros(2, pixels.shape[1], dtype=torch.float64)
    for start in range(0, len(pixels), CHUNK):
        part = pixels[start : start + CHUNK].double() / 255
        total += part.sum((0, 2, 3))
        squares += part.square().sum((0, 2, 3))
    count = pixels.numel() / pixels.shape[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt().clamp_min(0.01)
    first, second = (tuple(round(v, DIGITS) for v in values.tolist()) for values in (mean, std))
    return first, second

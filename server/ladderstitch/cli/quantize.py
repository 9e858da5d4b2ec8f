"""The command `quantize`, which adds low-bit variants to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ladderstitch.bundles import find_bundle, is_language_bundle
from ladderstitch.cli.bundle_records import print_bundle, quality_records
from ladderstitch.cli.console import Json, err, progress_bar, user_errors
from ladderstitch.cli.measure import print_measured
from ladderstitch.errors import ConfigError


def quantize(
    bundle: Annotated[str, typer.Argument(help="Directory of a bundle, or name of a model.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Image models: folder of images, whose labels are not used, CSV file of "
            "path,label, or folder of gzipped IDX files."
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Image models: split of IDX files to take images from.")
    ] = "train",
    images: Annotated[
        int, typer.Option(min=1, help="Image models: images that the ranges are measured on.")
    ] = 256,
    text: Annotated[
        Path | None, typer.Option(help="Language models: held-out text to measure all paths on.")
    ] = None,
    precision: Annotated[
        Literal["int4", "int8"],
        typer.Option(help="Language models: number format; image models have int8 only."),
    ] = "int4",
    as_json: Json = False,
) -> None:
    """Add low-bit forms of all variants of a bundle.

    They are further variants. Image models: weights and the inputs of products get 8 bits; the
    ranges of activations are measured on images of the data. The new variants have the ids after
    the present ones. `calibrate` measures their quality, and the frontier contains those of them
    that are worth it.

    Language models: weights get 4 or 8 bits when the model is loaded, and activations 8. All paths
    are measured on the text.

    Example: `ladderstitch quantize smollm2 --text data/brown/heldout.txt`
    """
    with user_errors():
        path = find_bundle(bundle)
        if is_language_bundle(path):
            if text is None:
                raise ConfigError("text: expected a held-out text for a language model, got none")
            _quantize_language(path, precision, text, as_json=as_json)
            err.print(f"wrote {path}; next: ladderstitch serve --model {bundle}")
        else:
            if data is None:
                raise ConfigError("data: expected a folder of images for an image model, got none")
            folder = _quantize_vision(path, data, split, images)
            if as_json:
                print_bundle(path, written=str(folder))
            err.print(f"wrote {folder}; next: ladderstitch calibrate {bundle} --data {data}")


def _quantize_vision(path: Path, data: Path, split: str, images: int) -> Path:
    """Add the int8 variants of an image model; returns their folder."""
    from ladderstitch.training.vision.dataset import is_idx_folder, load_idx_folder, normalise
    from ladderstitch.training.vision.image_files import load_sample
    from ladderstitch.training.vision.quantize import quantize as run
    from ladderstitch.vision.bundle import VisionBundle

    with progress_bar() as progress:
        loaded = VisionBundle.load(path)
        inputs = loaded.manifest.preprocessing
        if is_idx_folder(data):
            shape = (inputs.channels, inputs.height, inputs.width)
            labelled = load_idx_folder(data, split, shape, len(loaded.manifest.labels))
            pixels = labelled.pixels[:images]
        else:
            pixels = load_sample(data, images, inputs, seed=0)
        task = progress.add_task("quantize", total=None)
        run(
            loaded,
            normalise(pixels, inputs.mean, inputs.std).numpy(),
            lambda done, all_: progress.update(task, completed=done, total=all_),
        )
    return loaded.int8_folder


def _quantize_language(
    path: Path, precision: Literal["int4", "int8"], text: Path, *, as_json: bool
) -> None:
    from ladderstitch.text.bundle import TextBundle
    from ladderstitch.training.text.calibrate import DEFAULT_SAMPLE, quantise

    bundle = TextBundle.load(path, calibrated=False)
    with progress_bar() as progress:
        table = quantise(bundle, precision, text, DEFAULT_SAMPLE, 1, progress)
    names = [variant.name for variant in TextBundle.load(path).manifest.variants]
    print_measured(path, quality_records(names, table), as_json=as_json)

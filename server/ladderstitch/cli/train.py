"""The commands that train image networks: `train` and `stitch`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from ladderstitch.cli.bundle_records import print_bundle
from ladderstitch.cli.console import Json, err, progress_bar, user_errors
from ladderstitch.cli.output import Record, print_json
from ladderstitch.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress

    from ladderstitch.training.vision.recipe import AnyRecipe, Recipe
    from ladderstitch.training.vision.training_data import TrainingData

R = TypeVar("R", bound="AnyRecipe")
LABELLED = (
    "Folder with one subfolder per class, CSV file of path,label, or folder of gzipped IDX files."
)
RunFolder = Annotated[Path, typer.Option("--run", help="Folder for checkpoints, logs and weights.")]
BATCH = 100
"""Images in a batch that is measured."""


def train(
    data: Annotated[Path, typer.Option(help=LABELLED)],
    recipe: Annotated[
        Path | None,
        typer.Argument(
            help="YAML recipe, e.g. examples/*/recipe.yaml (default: three residual networks for "
            "pictures of 64 x 64)."
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoints, logs and weights (default: INTO.run)."),
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(
            help="Bundle directory to write: the anchors are stitched, and measured on the images "
            "that are held out."
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the model in requests (default: the recipe's, or INTO's)."),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Side of the images in pixels (default: the recipe's)."),
    ] = None,
    split: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=0.99,
            help="Share of every class that is held out and measured on (default: the recipe's).",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of everything random (default: the recipe's).")
    ] = None,
    nested: Annotated[
        bool,
        typer.Option(
            "--nested", help="The recipe is that of a supernet, e.g. examples/nested/recipe.yaml."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train the anchors of a family from scratch.

    The largest is the first. Resumes if it was interrupted. With `--into`, all steps to a bundle
    that can be served follow. With `--nested`, one supernet is trained instead, whose listed
    networks are slices of the largest (`--into` is needed). Labels are the names of the classes,
    unless the recipe states them.

    Example: `ladderstitch train --data photos/ --into bundles/mine`
    """
    from ladderstitch.training.vision.anchors import train_anchors
    from ladderstitch.training.vision.training_data import load_training_data

    with user_errors(), progress_bar() as progress:
        if nested:
            folder, used = _train_nested(
                data, recipe, run, into, name, image_size, split, seed, progress
            )
        else:
            parsed, folder = _read_options(recipe, run, into, name, seed)
            loaded = load_training_data(parsed, data, image_size=image_size, split=split)
            used = _print_counts(loaded)
            if into is not None and not len(loaded.validation):
                raise ConfigError("into: expected images to measure on, got validation_images 0")
            train_anchors(loaded, folder, progress)
            if into is not None:
                _finish(loaded, folder, into, progress)
    _print_trained(folder, into, used, recipe, as_json=as_json)


def _print_trained(
    run: Path, into: Path | None, used: Record, recipe: Path | None, *, as_json: bool
) -> None:
    """Print what a training wrote, and what to do next."""
    if into is None:
        if as_json:
            print_json({"bundle": None, "run": str(run), **used, "variants": []})
        err.print(f"wrote anchors to {run}; next: ladderstitch stitch {recipe} ...")
    else:
        if as_json:
            print_bundle(into, run=str(run), **used)
        err.print(f"wrote {into}; next: ladderstitch serve --model {into}", soft_wrap=True)


def _train_nested(
    data: Path,
    recipe: Path | None,
    run: Path | None,
    into: Path | None,
    name: str | None,
    image_size: int | None,
    split: float | None,
    seed: int | None,
    progress: Progress,
) -> tuple[Path, Record]:
    """Train a supernet, write its bundle, and measure it on the images that are held out.

    Returns the folder of the run, and the images that were used.
    """
    from ladderstitch.training.vision.calibrate import calibrate
    from ladderstitch.training.vision.nested import export_nested, train_nested
    from ladderstitch.training.vision.recipe import NestedRecipe
    from ladderstitch.training.vision.training_data import load_training_data
    from ladderstitch.vision.bundle import VisionBundle

    if recipe is None or into is None:
        raise ConfigError("nested: expected a recipe and --into, got one of both or none")
    parsed = NestedRecipe.load(recipe)
    parsed = parsed.renamed(name or parsed.name, parsed.seed if seed is None else seed)
    loaded = load_training_data(parsed, data, image_size=image_size, split=split)
    used, folder = _print_counts(loaded), run or into.with_name(into.name + ".run")
    if not len(loaded.validation):
        raise ConfigError("into: expected images to measure on, got validation_images 0")
    model = train_nested(loaded, folder, progress)
    export_nested(loaded.recipe, model, folder, into)
    measured = f"{len(loaded.validation)} images of {parsed.data.name} that were held out"
    calibrate(VisionBundle.load(into), loaded.validation, measured, BATCH, progress)
    return folder, used


def _read_options(
    recipe: Path | None, run: Path | None, into: Path | None, name: str | None, seed: int | None
) -> tuple[Recipe, Path]:
    """Return the recipe, named and seeded, and the folder of the run.

    Raises `ConfigError` for options that do not fit each other.
    """
    from ladderstitch.training.vision.recipe import OWN_PICTURES, Recipe

    if run is None and into is None:
        raise ConfigError("run: expected a folder, or --into, got neither")
    if recipe is None and into is None:
        raise ConfigError("recipe: expected a file, or --into, got neither")
    parsed = Recipe.load(recipe or OWN_PICTURES)
    if recipe is None and name is None and into is not None:
        name = into.resolve().name
    if into is not None and into.exists() and not into.is_dir():
        raise ConfigError(f"into: expected a folder, got the file {into}")
    if run is None:
        assert into is not None
        run = into.with_name(into.name + ".run")
    return parsed.renamed(name or parsed.name, parsed.seed if seed is None else seed), run


def _print_counts(data: TrainingData[R]) -> Record:
    """Print the numbers of images and the labels; returns them as fields of a document."""
    shown = ", ".join(data.recipe.labels[:10])
    more = len(data.recipe.labels) - 10
    err.print(
        f"{len(data.train)} images to train on, {len(data.validation)} held out; "
        f"{len(data.recipe.labels)} labels: {shown}{f' and {more} more' if more > 0 else ''}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return {
        "images": len(data.train),
        "held_out": len(data.validation),
        "labels": list(data.recipe.labels),
    }


def _finish(data: TrainingData[Recipe], run: Path, into: Path, progress: Progress) -> None:
    """Stitch the anchors, write the bundle, and measure it on the images that are held out."""
    from ladderstitch.training.vision.calibrate import calibrate
    from ladderstitch.training.vision.stitch import export_family, stitch_family
    from ladderstitch.vision.bundle import VisionBundle

    model = stitch_family(data, run, progress)
    export_family(data.recipe, model, run, into)
    count = len(data.validation)
    measured = f"{count} images of {data.recipe.data.name} that were held out"
    calibrate(VisionBundle.load(into), data.validation, measured, BATCH, progress)


def stitch(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, e.g. examples/*/recipe.yaml.")],
    run: RunFolder,
    bundle: Annotated[Path, typer.Option(help="Bundle directory to write.")],
    data: Annotated[Path | None, typer.Option(help=LABELLED)] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images without labels, instead of --data: stitching layers are fitted "
            "by least squares and nothing is trained."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Join trained anchors into a stitchable family.

    Writes its bundle. Stitching layers are initialised by least squares on the anchors' features.
    Then all weights are trained jointly, one stitch per step, on the labels and on the predictions
    of the largest anchor. Resumes if it was interrupted. Sizes, labels and split are those of
    `train`.
    """
    from ladderstitch.training.vision.recipe import Recipe
    from ladderstitch.training.vision.stitch import (
        complete_recipe,
        export_family,
        stitch_family,
        stitch_unlabelled,
    )
    from ladderstitch.training.vision.training_data import load_run_data

    with user_errors(), progress_bar() as progress:
        if (data is None) == (images is None):
            raise ConfigError("data: expected either labelled images or --images")
        parsed = Recipe.load(recipe)
        measured: Path | str = images or "DATA"
        if data is None:
            assert images is not None
            model = stitch_unlabelled(parsed, run, images)
            export_family(complete_recipe(parsed, run), model, run, bundle)
            measured = f"--images {images}"
        else:
            loaded = load_run_data(parsed, data, run)
            model = stitch_family(loaded, run, progress)
            export_family(loaded.recipe, model, run, bundle)
            held_out = run / "held-out.csv"
            measured = f"--data {data if loaded.held_out is None else held_out}"
    if as_json:
        print_bundle(bundle)
    err.print(f"wrote {bundle}; next: ladderstitch calibrate {bundle} {measured}", soft_wrap=True)

"""Commands that make a family: fetch data, train anchors, stitch them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ladderstitch.cli.console import err, out, progress_bar, user_errors

RecipeFile = Annotated[Path, typer.Argument(help="YAML recipe, e.g. examples/*/recipe.yaml")]
DataFolder = Annotated[Path, typer.Option("--data", help="Folder of gzipped IDX files.")]
RunFolder = Annotated[Path, typer.Option("--run", help="Where checkpoints, logs and weights go.")]


def fetch(
    what: Annotated[
        str, typer.Argument(help="fashion-mnist, brown (data), smollm2 (language model)")
    ],
    into: Annotated[
        Path | None,
        typer.Option(help="Folder to put it in; default: data/NAME, or where models are kept."),
    ] = None,
) -> None:
    """Download a data set that a recipe names, or a model to serve. Needs no root."""
    from ladderstitch.catalogue import models_home
    from ladderstitch.language.fetch import MODELS, fetch_model
    from ladderstitch.training.fetch import fetch_data

    with user_errors():
        if what not in MODELS:
            folder = into or Path("data") / what
            fetch_data(what, folder)
            out.print(f"{what} is in {folder}")
            return
        folder = into or models_home() / what
        with progress_bar() as progress:
            task = progress.add_task(f"importing {what}", total=None)
            fetch_model(
                what, folder, lambda done, all_: progress.update(task, completed=done, total=all_)
            )
    served = what if into is None else folder
    out.print(f"{what} is in {folder}; next: ladderstitch serve --model {served}")


def train(recipe: RecipeFile, data: DataFolder, run: RunFolder) -> None:
    """Train a family's anchors from scratch, largest first. Resumes where it was stopped."""
    from ladderstitch.training.anchors import train_anchors
    from ladderstitch.training.data import load_idx_folder
    from ladderstitch.training.recipe import Recipe

    with user_errors(), progress_bar() as progress:
        train_anchors(Recipe.load(recipe), load_idx_folder(data, "train"), run, progress)
    err.print(f"Anchors are in {run}; next: ladderstitch stitch {recipe} ...")


def stitch(
    recipe: RecipeFile,
    data: DataFolder,
    run: RunFolder,
    bundle: Annotated[Path, typer.Option(help="Bundle directory to write.")],
) -> None:
    """Join trained anchors into a stitchable family and write its bundle.

    Stitching layers start from least squares on the anchors' features; then everything is tuned
    jointly, one stitch a step, taught by the labels and by the largest anchor. Resumable.
    """
    from ladderstitch.training.data import load_idx_folder
    from ladderstitch.training.recipe import Recipe
    from ladderstitch.training.stitching import export_family, stitch_family

    with user_errors(), progress_bar() as progress:
        parsed = Recipe.load(recipe)
        model = stitch_family(parsed, load_idx_folder(data, "train"), run, progress)
        export_family(parsed, model, bundle)
    err.print(f"Wrote {bundle}; next: ladderstitch calibrate {bundle} --data {data}")


def register(app: typer.Typer) -> None:
    group = "Make a family"
    app.command(rich_help_panel=group)(fetch)
    app.command(rich_help_panel=group)(train)
    app.command(rich_help_panel=group)(stitch)

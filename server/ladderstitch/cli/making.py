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
    what: Annotated[str, typer.Argument(help="What to fetch: fashion-mnist")],
    into: Annotated[Path, typer.Option(help="Folder to put it in.")] = Path("data/fashion-mnist"),
) -> None:
    """Download a data set that a recipe names, without root (Debian and Ubuntu)."""
    from ladderstitch.training.fetch import fetch_data

    with user_errors():
        fetch_data(what, into)
    out.print(f"{what} is in {into}")


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

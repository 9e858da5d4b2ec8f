"""The command that trains a stitched language family: `train-elastic`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ladderstitch.cli.console import err, out, progress_bar, user_errors


def train_elastic(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe: sizes, anchors and schedules.")],
    text: Annotated[list[Path], typer.Option(help="Text files to train on.")],
    held_out: Annotated[Path, typer.Option(help="Held-out text, on which paths are measured.")],
    into: Annotated[Path, typer.Option(help="Bundle directory to write.")],
    work: Annotated[
        Path | None,
        typer.Option(help="Folder of checkpoints, logs and figures (default: INTO.work)."),
    ] = None,
) -> None:
    """Train a stitched language family from texts and write its bundle.

    The anchors are language models of different widths, trained from scratch. Stitching maps
    between them are fitted by least squares. Then all weights are trained on texts whose tokens
    take different paths, so that an answer may change its path. The work folder has the
    measurements in `elastic.json`. Resumes if it was interrupted.

    Example: `ladderstitch train-elastic examples/elastic-text/recipe.yaml --text
    data/brown/train.txt --held-out data/brown/heldout.txt --into elastic-text`
    """
    from ladderstitch.training.text.elastic_recipe import ElasticRecipe
    from ladderstitch.training.text.train_elastic import ElasticTraining
    from ladderstitch.training.text.train_elastic import train_elastic as run

    with user_errors():
        folder = work or into.with_name(into.name + ".work")
        training = ElasticTraining(ElasticRecipe.load(recipe), text, held_out, into, folder)
        with progress_bar() as progress:
            measured = run(training, progress)
    table = Table("path", "next-token accuracy", "loss, nats", "gap closed")
    for name, path in measured.paths.items():
        table.add_row(
            name, f"{path.accuracy:.4f}", f"{path.loss_nats:.3f}", f"{path.gap_closed:.0%}"
        )
    out.print(table)
    for switch, curve in measured.switches.items():
        out.print(f"switch {switch}: divergence {curve.divergence_nats:.4f} nats", highlight=False)
    err.print(
        f"wrote {into}; next: ladderstitch serve --model {into}", highlight=False, soft_wrap=True
    )


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("train-elastic", rich_help_panel="Make a family")(train_elastic)

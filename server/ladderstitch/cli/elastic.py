"""The command that trains a stitched language family: `train-elastic`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ladderstitch.cli.console import Json, err, progress_bar, user_errors
from ladderstitch.cli.output import Column, print_json, print_records


def train_elastic(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe: sizes, anchors and schedules.")],
    text: Annotated[list[Path], typer.Option(help="Text files to train on.")],
    held_out: Annotated[Path, typer.Option(help="Held-out text, on which paths are measured.")],
    into: Annotated[Path, typer.Option(help="Bundle directory to write.")],
    work: Annotated[
        Path | None,
        typer.Option(help="Folder of checkpoints, logs and figures (default: INTO.work)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a stitched language family from texts.

    Writes its bundle. The anchors are language models of different widths, trained from scratch.
    Stitching maps between them are fitted by least squares. Then all weights are trained on texts
    whose tokens take different paths, so that an answer may change its path. The work folder has
    the measurements in `elastic.json`. Resumes if it was interrupted.

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
    paths = [
        {
            "name": name,
            "quality": path.accuracy,
            "loss_nats": path.loss_nats,
            "gap_closed": path.gap_closed,
        }
        for name, path in measured.paths.items()
    ]
    switches = {name: curve.divergence_nats for name, curve in measured.switches.items()}
    if as_json:
        print_json({"bundle": str(into), "variants": paths, "switch_divergence_nats": switches})
    else:
        listed = [f"switch {name}: divergence {d:.4f} nats" for name, d in switches.items()]
        print_records(paths, COLUMNS, note="\n".join(listed))
    err.print(
        f"wrote {into}; next: ladderstitch serve --model {into}", highlight=False, soft_wrap=True
    )


COLUMNS = (
    Column("path", lambda r: str(r["name"]), text=True),
    Column("next-token accuracy", lambda r: f"{r['quality']:.4f}"),
    Column("loss, nats", lambda r: f"{r['loss_nats']:.3f}"),
    Column("gap closed", lambda r: f"{r['gap_closed']:.0%}"),
)

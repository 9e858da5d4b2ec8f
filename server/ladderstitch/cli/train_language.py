"""The command `train-language`, which compares residual schemes from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ladderstitch.cli.console import Json, progress_bar, user_errors
from ladderstitch.cli.output import Column, print_json, print_records


def train_language(
    recipe: Annotated[
        Path, typer.Option(help="YAML file with sizes, residual schemes and schedule.")
    ],
    text: Annotated[list[Path], typer.Option(help="Text files to train on.")],
    held_out: Annotated[list[Path], typer.Option(help="Held-out text files.")],
    run: Annotated[Path, typer.Option(help="Folder for checkpoints, logs and bundles.")],
    as_json: Json = False,
) -> None:
    """Train small language models to compare schemes.

    One is trained from scratch with each residual scheme. Text, seed and batches are the same, so
    that the held-out losses show the cost of the scheme. Writes a bundle for each scheme, a plot
    and `pair.json`. Resumes if it was interrupted.

    Example: `ladderstitch train-language --recipe examples/small-pair/pair.yaml --text
    data/brown/train.txt --held-out data/brown/heldout.txt --run runs/small-pair`
    """
    from ladderstitch.training.text.compare_schemes import SchemeComparison, compare_schemes
    from ladderstitch.training.text.scratch import ScratchRecipe

    with user_errors():
        comparison = SchemeComparison(ScratchRecipe.load(recipe), text, held_out, run)
        with progress_bar() as progress:
            found = compare_schemes(comparison, progress)
    losses = found["held_out_loss"]
    assert isinstance(losses, dict)
    if as_json:
        print_json({"parameters": found["parameters"], "held_out_loss": losses})
    else:
        records = [{"name": scheme, "held_out_loss": loss} for scheme, loss in losses.items()]
        print_records(records, SCHEME_COLUMNS, title=f"{found['parameters']} parameters")


SCHEME_COLUMNS = (
    Column("scheme", lambda r: str(r["name"]), text=True),
    Column("held-out loss, nats", lambda r: f"{r['held_out_loss']:.4f}"),
)

"""The command `fetch`, which downloads a data set or a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ladderstitch.bundles import models_home
from ladderstitch.cli.console import Json, out, progress_bar, user_errors
from ladderstitch.cli.output import print_json
from ladderstitch.errors import ConfigError

DATA = ("fashion-mnist", "brown", "austen")
MODELS = ("smollm2", "smollm2-ladder", "efficientnet-lite")


def fetch(
    what: Annotated[
        str,
        typer.Argument(help=f"Data set ({', '.join(DATA)}) or model ({', '.join(MODELS)})."),
    ],
    into: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write (default: data/NAME for data, the folder of models otherwise)."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Download a data set that a recipe names, or a model.

    No root access is needed.
    """
    from ladderstitch.importers.fetch import fetch_data, fetch_model
    from ladderstitch.importers.fetch_efficientnet import fetch_efficientnet

    with user_errors():
        if what not in (*DATA, *MODELS):
            names = ", ".join((*DATA, *MODELS))
            raise ConfigError(f"what: expected one of {names}, got {what!r}")
        folder = into or (Path("data") if what in DATA else models_home()) / what
        num_correct: dict[int, int] = {}
        if what == "efficientnet-lite":
            with progress_bar() as progress:
                num_correct = fetch_efficientnet(folder, progress)
        elif what in MODELS:
            with progress_bar() as progress:
                task = progress.add_task(f"importing {what}", total=None)
                fetch_model(
                    what,
                    folder,
                    lambda done, all_: progress.update(task, completed=done, total=all_),
                )
        else:
            fetch_data(what, folder)
    if as_json:
        correct = [{"variant": stitch, "correct": n} for stitch, n in num_correct.items()]
        kind = "data" if what in DATA else "model"
        print_json({"name": what, "kind": kind, "folder": str(folder), "photographs": correct})
        return
    if num_correct:
        listed = ", ".join(f"{stitch}: {count}" for stitch, count in num_correct.items())
        out.print(f"correct of 20 labelled photographs, by stitch: {listed}")
    following = "" if what in DATA else f"; next: ladderstitch serve --model {into or what}"
    out.print(f"fetched {what} to {folder}{following}")

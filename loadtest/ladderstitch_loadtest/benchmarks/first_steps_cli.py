"""Command `first-steps`: a folder of transformers to a token, two ONNX files to a family."""

from __future__ import annotations

import tempfile
from pathlib import Path

import typer
from rich.table import Table

from ladderstitch.cli.console import err, out, user_errors
from ladderstitch_loadtest.benchmarks.first_steps import first_token, served_family
from ladderstitch_loadtest.cli_options import OutFolder
from ladderstitch_loadtest.servers.results_io import write

LIMIT_S = 900.0
"""Seconds from two ONNX files and 200 images to the first answer of the served family."""


def first_steps(folder: OutFolder = None) -> None:
    """Time the way from own files to the first token, and to a served family of two networks.

    It needs the bundle efficientnet-lite: `ladderstitch fetch efficientnet-lite`.
    """
    with tempfile.TemporaryDirectory() as work, user_errors(), err.status("starting") as status:
        journeys = {
            "language": first_token(Path(work), status.update),
            "images": served_family(Path(work), status.update),
        }
    table = Table("journey", "step", "seconds")
    for name, journey in journeys.items():
        for step, seconds in journey.seconds.items():
            table.add_row(name, step, f"{seconds:.1f}")
    out.print(table)
    figures = {name: journey.to_dict() for name, journey in journeys.items()}
    write(folder, "first-steps", {"limit_s": LIMIT_S} | figures)
    raise typer.Exit(int(journeys["images"].seconds["total"] > LIMIT_S))

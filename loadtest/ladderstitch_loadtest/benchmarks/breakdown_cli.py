"""The command `breakdown`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ladderstitch.bundles import EMBEDDED, find_bundle
from ladderstitch.cli.console import err, out, plain_table, user_errors
from ladderstitch_loadtest.benchmarks.breakdown import Breakdown, measure
from ladderstitch_loadtest.cli_options import Bundle, OutFolder
from ladderstitch_loadtest.load.closed_loop import find_generator
from ladderstitch_loadtest.servers.results_io import write

ROWS = {
    "answers_per_s": "answers/s",
    "echo_answers_per_s": "the same of a bare echo",
    "latency_ms": "latency, ms",
    "echo_ms": "the same of a bare echo",
    "transport_ms": "in it: gRPC, sockets, generator",
    "queue_ms": "in it: handler's start to batch's",
    "dispatch_ms": "in it: batch's start to answer, without compute",
    "compute_ms": "in it: compute",
    "mean_batch": "requests in a batch",
    "loop_us": "CPU per answer, us: event loop",
    "grpc_us": "CPU per answer, us: threads of gRPC",
    "other_threads_us": "CPU per answer, us: compute and other threads",
    "workers_us": "CPU per answer, us: worker processes",
}
"""Printed names of the fields."""


def breakdown(
    bundle: Bundle = EMBEDDED,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of echo and server.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of each run.")] = 2.0,
    source: Annotated[
        Path | None,
        typer.Option(help="Checkout of another version, whose server is measured."),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the result file.")] = "breakdown",
    folder: OutFolder = None,
) -> None:
    """Show where the time of one answer goes, at 1, 8 and 32 callers.

    All requests are pinned to the model's first network and have no budget.
    """
    generator = find_generator()
    with user_errors(), err.status("starting") as status:
        path = find_bundle(str(bundle))
        found = measure(path, rounds, seconds, generator, source, status.update)
    out.print(format_table(found))
    figures = {"bundle": path.name, "generator": generator, "rounds": rounds, "seconds": seconds}
    write(folder, name, figures | {"callers": [row.to_dict() for row in found]})


def format_table(found: Sequence[Breakdown]) -> Table:
    """Return one row per quantity, and one column per number of callers."""
    cells = [
        (label, *(_format(getattr(row, field), field) for row in found))
        for field, label in ROWS.items()
    ]
    return plain_table(("callers", *(str(row.callers) for row in found)), cells, text=("callers",))


def _format(value: float, field: str) -> str:
    if field.endswith("_ms"):
        return f"{value:.2f}"
    return f"{value:.1f}" if field == "mean_batch" else f"{value:,.0f}"

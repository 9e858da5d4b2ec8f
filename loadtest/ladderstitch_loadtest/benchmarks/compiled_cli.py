"""The command `compiled`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from ladderstitch.bundles import EMBEDDED, find_bundle
from ladderstitch.cli.console import out, plain_table, user_errors
from ladderstitch_loadtest.benchmarks.compiled import Compute, measure
from ladderstitch_loadtest.cli_options import Bundle, OutFolder
from ladderstitch_loadtest.servers.results_io import write


def compiled(
    bundle: Bundle = EMBEDDED,
    rounds: Annotated[int, typer.Option(min=3, help="Timed runs of each network.")] = 100,
    folder: OutFolder = None,
) -> None:
    """Compare the compute of the frontier with ONNX Runtime's whole graphs and eager torch."""
    with user_errors():
        path = find_bundle(str(bundle))
    rows = measure(path, rounds)
    out.print(_compute_table(rows))
    write(folder, f"compiled-{path.name}", {"networks": [asdict(row) for row in rows]})


def _compute_table(rows: Sequence[Compute]) -> Table:
    columns = ("id", "batch", "served", "whole", "eager", "ratio", "speed-up", "difference")
    cells = [
        (
            str(row.variant),
            str(row.batch_size),
            f"{row.served_ms:.3f} ms",
            f"{row.whole_ms:.3f} ms",
            f"{row.eager_ms:.3f} ms",
            f"{row.ratio:.3f}",
            f"{row.speedup:.2f}x",
            f"{row.difference:.0e}",
        )
        for row in rows
    ]
    return plain_table(columns, cells, text=())

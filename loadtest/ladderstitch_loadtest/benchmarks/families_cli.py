"""Command `families`: a stitched family and the same networks without stitches."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ladderstitch.cli.console import err, out
from ladderstitch_loadtest.benchmarks.families import (
    FamiliesResult,
    compare_families,
    write_families,
)
from ladderstitch_loadtest.cli_options import Images, OutFolder, Rounds
from ladderstitch_loadtest.servers.processes import ladderstitch_server
from ladderstitch_loadtest.servers.results_io import write


def families(
    images: Images = 16,
    load: Annotated[
        float, typer.Option(help="Rate over what the best network answers one by one.")
    ] = 2.0,
    seconds: Annotated[float, typer.Option(min=1, help="Length of one run.")] = 10.0,
    rounds: Rounds = 5,
    folder: OutFolder = None,
) -> None:
    """Compare the embedded family in float32 with its three joined networks without stitches.

    Both get the same arrivals in turn: three budgets, and a tenfold burst.
    """
    with ExitStack() as stack, err.status("writing both families") as status:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        written = write_families(work)
        addresses = {}
        for name, path in written.bundles.items():
            status.update(f"starting the server of {name}")
            server = ladderstitch_server("--no-ray", "--bundle", str(path))
            addresses[name] = stack.enter_context(server).address
        found = asyncio.run(
            compare_families(
                addresses,
                written,
                images=images,
                load=load,
                seconds=seconds,
                rounds=rounds,
                advance=status.update,
            )
        )
    out.print(_table(found))
    write(folder, "families-without-stitches", found.to_dict())


def _table(found: FamiliesResult) -> Table:
    """Return one row for each load and family."""
    columns = ("load", "requests/s", "family", "choices", "attainment", "quality", "stitched ahead")
    table = Table(*columns, title=f"{found.images} images a request, {found.rounds} rounds")
    for row in found.rows:
        table.add_row(
            row.load,
            f"{found.rates[row.load]:g}",
            row.family,
            str(found.choices[row.family]),
            f"{100 * row.attainment:.2f} %",
            f"{100 * row.effective_quality:.2f}",
            f"{row.behind:+.2f} ± {row.behind_half_width:.2f}",
        )
    return table

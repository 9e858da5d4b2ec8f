"""Command `burst`: policies in a tenfold burst of load on a server of the embedded model."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
from rich.table import Table

from ladderstitch.cli.console import err, out
from ladderstitch_loadtest.benchmarks.burst import BurstResult, measure_burst
from ladderstitch_loadtest.cli_options import (
    Cpu,
    Images,
    OutFolder,
    Policies,
    Rounds,
    embedded_server,
)
from ladderstitch_loadtest.load.targets import find_target
from ladderstitch_loadtest.servers.results_io import write


def burst(
    images: Images = 16,
    budget_ms: Annotated[
        float, typer.Option(help="Budget of every request, as a hard deadline.")
    ] = 50.0,
    rounds: Rounds = 3,
    policy: Policies = [  # noqa: B006 # typer reads it only
        "adaptive",
        "slackfit",
    ],
    cpu: Cpu = None,
    folder: OutFolder = None,
) -> None:
    """Compare policies and fixed variants in a tenfold burst of 2 s on the embedded model.

    The burst's rate is 0.6 of the server's capacity on its fastest variant.
    """
    with embedded_server(cpu) as server, err.status("starting") as status:
        found = asyncio.run(
            measure_burst(
                server,
                find_target(server.address, "ladderstitch", "", hard=True, images=images),
                policies=policy,
                budget_s=budget_ms / 1e3,
                rounds=rounds,
                cpus=None if cpu is None else [cpu],
                advance=status.update,
            )
        )
    out.print(_burst_table(found, images))
    out.print(f"free engine to next batch: at most {found.dispatch_p99_ms:g} ms at p99")
    write(folder, "burst", {"images": images, **found.to_dict()})


def _burst_table(found: BurstResult, images: int) -> Table:
    table = Table(
        "policy",
        "attainment in the burst",
        "effective quality",
        "quality before",
        "in the burst",
        "1 s after",
        "adaptive ahead",
        title=f"{found.base_rps:g} -> {10 * found.base_rps:g} requests/s of {images} images",
    )
    for row in found.rows:
        figures = (
            row.attainment_burst,
            row.effective_quality,
            row.quality_before,
            row.quality_burst,
            row.quality_recovered,
        )
        ahead = f"{row.behind:+.2f} ± {row.behind_half_width:.2f}"
        table.add_row(row.policy, *(f"{100 * figure:.2f}" for figure in figures), ahead)
    return table

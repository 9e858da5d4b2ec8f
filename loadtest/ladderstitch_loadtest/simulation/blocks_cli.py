"""The command `blocks`."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.table import Table

from ladderstitch.bundles import find_bundle
from ladderstitch.cli.console import out, progress_bar
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch_loadtest.cli_options import OutFolder
from ladderstitch_loadtest.servers.results_io import write
from ladderstitch_loadtest.simulation import block_sweep
from ladderstitch_loadtest.simulation.block_routes import BlockRoutes
from ladderstitch_loadtest.simulation.profiles import Family, supernet


def blocks(
    requests: Annotated[int, typer.Option(min=10, help="Requests of each trace.")] = 1000,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each engine, paired by seed.")] = 10,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that simulate; default: one per CPU.")
    ] = os.cpu_count() or 1,
    folder: OutFolder = None,
) -> None:
    """Simulate mixed batches, late binding and preemption between blocks on mixed budgets."""
    bundle = VisionBundle.load(find_bundle("fashion-mnist"))
    embedded, ladder = Family.from_bundle(bundle), supernet()
    pairs = [
        (ladder, BlockRoutes.ladder(ladder)),
        (embedded, BlockRoutes.from_bundle(bundle, embedded)),
    ]
    traces = block_sweep.block_scenarios(requests)
    with progress_bar() as progress:
        total = len(pairs) * len(traces) * len(block_sweep.OPTIONS) * seeds
        task = progress.add_task("simulating", total=total)
        found = list(
            block_sweep.sweep_blocks(
                pairs, traces, seeds, workers, lambda runs: progress.advance(task, runs)
            )
        )
    table = Table("family", "trace", "engine", "effective quality", "gain", "attainment", "gain")
    for one in found:
        table.add_row(
            one.family,
            one.scenario,
            one.engine,
            f"{100 * one.effective_quality:.2f}",
            f"{one.quality_gain:+.2f} ± {one.quality_half_width:.2f}",
            f"{100 * one.attainment:.2f}",
            f"{one.attainment_gain:+.2f} ± {one.attainment_half_width:.2f}",
        )
    out.print(table)
    write(folder, "blocks", {"gains": [one.to_dict() for one in found]})

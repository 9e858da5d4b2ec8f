"""`ladderstitch-loadtest soak`: whether anything leaks, sticks or surprises in an hour."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from rich.table import Table

from ladderstitch.bundles import HOME_VARIABLE
from ladderstitch.cli.console import err, out, progress_bar
from ladderstitch_loadtest.faults.fault_injection import until_all_serve
from ladderstitch_loadtest.faults.soak import IMAGES, STUCK_S, TEXT, Soak
from ladderstitch_loadtest.faults.soak_result import SoakResult
from ladderstitch_loadtest.servers.process_supervisor import stage
from ladderstitch_loadtest.servers.results_io import write
from ladderstitch_loadtest.servers.tiny_language import write_tiny

SLOPE_MB_PER_HOUR = 20.0
"""Bar for gateway and survivor."""


def soak(
    seconds: Annotated[float, typer.Option(min=20, help="How long.")] = 3600.0,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for soak.json and soak.png.")
    ] = None,
) -> None:
    """Images, text, cancels, bad input; a replica restarted every two minutes. Two replicas and a
    gateway; exits with 1 if a request sticks or ends as it should not, or memory grows."""
    with models(), stage(2, 1, "--model", IMAGES) as (replicas, (gateway,)):
        until_all_serve([gateway.metrics], 2)
        with progress_bar() as progress:
            task = progress.add_task("soak", total=seconds)
            survivor, victim = replicas
            found = asyncio.run(
                Soak(
                    survivor,
                    victim,
                    gateway,
                    seconds,
                    lambda done: progress.update(task, completed=done),
                ).run()
            )
    out.print(table_of(found))
    for line in found.unexplained[:20]:
        err.print(line, highlight=False)
    write(folder, "soak", found.to_dict())
    if folder is not None:
        plot(found, folder / "soak.png")
    failures = shortfalls(found)
    for line in failures:
        err.print(f"[bold red]{line}[/]")
    raise typer.Exit(int(bool(failures)))


@contextmanager
def models() -> Iterator[None]:
    """A tiny language model where replicas that are started meanwhile find it."""
    before = os.environ.get(HOME_VARIABLE)
    with tempfile.TemporaryDirectory() as home:
        write_tiny(Path(home) / TEXT)
        os.environ[HOME_VARIABLE] = home
        try:
            yield
        finally:
            os.environ.pop(HOME_VARIABLE)
            if before is not None:
                os.environ[HOME_VARIABLE] = before


def shortfalls(found: SoakResult, stuck_s: float = STUCK_S) -> list[str]:
    """A line for each bar that a run of ten minutes or more does not meet."""
    lines = []
    if found.unexplained:
        lines.append(f"{len(found.unexplained)} requests ended as they should not have")
    if found.left_over:
        lines.append(f"{found.left_over:.0f} requests are still there, and nobody waits for them")
    if found.longest_s >= stuck_s:
        lines.append(f"a request took {found.longest_s:.1f} s")
    for which in ("gateway", "survivor"):
        slope = found.slope_mb_per_hour(which)
        if found.seconds >= 600 and slope > SLOPE_MB_PER_HOUR:
            lines.append(f"memory of the {which} grows by {slope:.1f} MB/h")
    return lines


def table_of(found: SoakResult) -> Table:
    table = Table(
        "requests",
        "ends",
        title=f"{found.seconds:.0f} s, {found.requests} requests, {len(found.disturbances)} "
        f"disturbances, longest {found.longest_s:.2f} s",
        caption="memory: "
        + ", ".join(
            f"{which} {getattr(found.samples[-1], f'{which}_mb'):.0f} MB, "
            f"{found.slope_mb_per_hour(which):+.1f} MB/h"
            for which in ("gateway", "survivor", "callers")
        ),
    )
    for kind, ends in found.ends.items():
        table.add_row(kind, ", ".join(f"{end} {count}" for end, count in sorted(ends.items())))
    return table


def plot(found: SoakResult, file: Path) -> None:
    """Memory, load and latency over time, disturbances as lines."""
    figure = Figure(figsize=(9, 7))
    memory, load, latency = figure.subplots(3, 1, sharex=True)
    minutes = [sample.at_s / 60 for sample in found.samples]
    for which in ("gateway", "survivor"):
        memory.plot(minutes, [getattr(s, f"{which}_mb") for s in found.samples], label=which)
    memory.set_ylabel("memory, MB")
    memory.set_ylim(bottom=0)
    memory.legend(fontsize=8)
    step_s = found.seconds / len(found.samples)
    load.plot(minutes, [sample.ended / step_s for sample in found.samples], linewidth=0.8)
    load.set_ylabel("ended a second")
    load.set_ylim(bottom=0)
    for name in ("p50", "p99"):
        values = [getattr(sample, f"image_{name}_ms") for sample in found.samples]
        latency.semilogy(minutes, [v or None for v in values], linewidth=0.8, label=name)
    latency.set_ylabel("images, ms")
    latency.set_xlabel("minutes")
    latency.legend(fontsize=8)
    for axes in (memory, load, latency):
        for at_s, _ in found.disturbances:
            axes.axvline(at_s / 60, color="grey", linewidth=0.4)
    figure.tight_layout()
    figure.savefig(file, dpi=110)

"""Command `soak`: an hour of mixed load with restarts, checked for leaks and stuck requests."""

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
from ladderstitch_loadtest.faults.soak import DEADLINE_S, IMAGES, TEXT, Soak
from ladderstitch_loadtest.faults.soak_result import SoakResult
from ladderstitch_loadtest.servers.process_supervisor import (
    replicas_and_gateways,
    wait_until_serving,
)
from ladderstitch_loadtest.servers.results_io import write
from ladderstitch_loadtest.servers.tiny_language import write_tiny

MAX_SLOPE_MB_PER_HOUR = 20.0
"""Limit for the memory growth of gateway and survivor in MiB/h."""
MIN_SECONDS_FOR_SLOPE = 600.0
"""Length of a run from which its memory growth is checked."""
MAX_PRINTED = 20


def soak(
    seconds: Annotated[float, typer.Option(min=20, help="Length of the run.")] = 3600.0,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for soak.json and soak.png.")
    ] = None,
) -> None:
    """Run images, text, cancels and bad input on two replicas and a gateway for an hour.

    A replica is restarted every two minutes. Exits with 1 if a request is stuck or ends in an
    unexpected way, or if memory grows.
    """
    replicas = replicas_and_gateways(2, 1, "--model", IMAGES)
    with tiny_model_home(), replicas as ((survivor, victim), (gateway,)):
        wait_until_serving([gateway], 2)
        with progress_bar() as progress:
            task = progress.add_task("soak", total=seconds)
            found = asyncio.run(
                Soak(
                    survivor,
                    victim,
                    gateway,
                    seconds,
                    lambda done: progress.update(task, completed=done),
                ).run()
            )
    out.print(_summary_table(found))
    for line in found.unexplained[:MAX_PRINTED]:
        err.print(line, highlight=False)
    write(folder, "soak", found.to_dict())
    if folder is not None:
        _plot(found, folder / "soak.png")
    failures = list_failures(found)
    for line in failures:
        err.print(f"[bold red]{line}[/]")
    raise typer.Exit(int(bool(failures)))


@contextmanager
def tiny_model_home() -> Iterator[None]:
    """Make a tiny language model findable for replicas that start during the `with` block."""
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


def list_failures(found: SoakResult, deadline_s: float = DEADLINE_S) -> list[str]:
    """Return a line for each limit that a run exceeds.

    Memory growth is checked for runs of ten minutes or more.
    """
    lines = []
    if found.unexplained:
        lines.append(f"{len(found.unexplained)} requests ended in an unexpected way")
    if found.left_over:
        lines.append(f"{found.left_over:.0f} requests are left over, though all callers stopped")
    if found.longest_s >= deadline_s:
        lines.append(f"a request took {found.longest_s:.1f} s")
    for process in ("gateway", "survivor"):
        slope = found.slope_mb_per_hour(process)
        if found.seconds >= MIN_SECONDS_FOR_SLOPE and slope > MAX_SLOPE_MB_PER_HOUR:
            lines.append(f"memory of the {process} grows by {slope:.1f} MB/h")
    return lines


def _summary_table(found: SoakResult) -> Table:
    table = Table(
        "requests",
        "ends",
        title=f"{found.seconds:.0f} s, {found.requests} requests, {len(found.disturbances)} "
        f"disturbances, longest {found.longest_s:.2f} s",
        caption="memory: "
        + ", ".join(
            f"{process} {getattr(found.samples[-1], f'{process}_mb'):.0f} MB, "
            f"{found.slope_mb_per_hour(process):+.1f} MB/h"
            for process in ("gateway", "survivor", "callers")
        ),
    )
    for kind, ends in found.ends.items():
        table.add_row(kind, ", ".join(f"{end} {count}" for end, count in sorted(ends.items())))
    return table


def _plot(found: SoakResult, file: Path) -> None:
    """Plot memory, load and latency over time, with disturbances as vertical lines."""
    figure = Figure(figsize=(9, 7))
    memory, load, latency = figure.subplots(3, 1, sharex=True)
    minutes = [sample.at_s / 60 for sample in found.samples]
    for process in ("gateway", "survivor"):
        memory.plot(minutes, [getattr(s, f"{process}_mb") for s in found.samples], label=process)
    memory.set_ylabel("memory, MB")
    memory.set_ylim(bottom=0)
    memory.legend(fontsize=8)
    step_s = found.seconds / len(found.samples)
    load.plot(minutes, [sample.ended / step_s for sample in found.samples], linewidth=0.8)
    load.set_ylabel("requests ended/s")
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

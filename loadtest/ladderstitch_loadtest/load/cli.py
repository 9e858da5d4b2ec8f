"""Command `run`: open-loop load of images on a running server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from ladderstitch.cli.console import err, out
from ladderstitch_loadtest.cli_options import (
    MinAttainment,
    ModelName,
    Processes,
    RunningServer,
    RunSeconds,
    Target,
)
from ladderstitch_loadtest.load.arrival_options import ArrivalFile, Arrivals, Cv2, arrival_times
from ladderstitch_loadtest.load.image_load import LoadRun, measure
from ladderstitch_loadtest.load.outcome import Summary, format_figure
from ladderstitch_loadtest.load.report import write_report
from ladderstitch_loadtest.load.targets import find_target
from ladderstitch_loadtest.load.traces import BudgetClass, Trace
from ladderstitch_loadtest.servers.results_io import write

Budgets = Annotated[
    list[str],
    typer.Option("--budget", help="Budget class as NAME:MILLISECONDS[:SHARE]; repeatable."),
]
MinQuality = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Exit with 1 if effective quality is below this value."),
]
SHOWN_QUANTILES = ("p50", "p99", "p99.9")


def run(
    address: RunningServer,
    rate: Annotated[float, typer.Option(min=0.1, help="Mean requests/s.")] = 100.0,
    seconds: RunSeconds = 10.0,
    arrivals: Arrivals = "poisson",
    cv2: Cv2 = 4.0,
    file: ArrivalFile = None,
    budget: Budgets = ["budget:20"],  # noqa: B006 # typer reads it only
    soft: Annotated[
        bool, typer.Option(help="Budgets are soft deadlines: late answers are still sent.")
    ] = False,
    target: Target = "ladderstitch",
    model: ModelName = "",
    processes: Processes = 1,
    seed: Annotated[int, typer.Option(help="Seed of arrivals and budgets.")] = 1,
    min_attainment: MinAttainment = None,
    min_effective_quality: MinQuality = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for load.json and load.html.")
    ] = None,
) -> None:
    """Send open-loop load of images: each request is sent when due, answered or not.

    Exits with 1 if a minimum is missed, and with 2 if the generator was the bottleneck.
    """
    rng = np.random.default_rng(seed)
    times = arrival_times(arrivals, rate, seconds, cv2, file, rng)
    try:
        classes = [BudgetClass.parse(text) for text in budget]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    trace = Trace.draw(arrivals, times, classes, rng)
    done = measure(
        address, find_target(address, target, model, hard=not soft), trace, processes=processes
    )
    summary = done.outcome.summary()
    out.print(_summary_table(summary))
    facts: dict[str, object] = {
        "server": address,
        "arrivals": arrivals,
        "rate": rate,
        "seconds": seconds,
        "seed": seed,
        "budgets": ", ".join(budget),
        "processes": processes,
    }
    _write_results(folder, f"Load on {address}", done, summary, facts)
    minimums = {
        "attainment": (min_attainment, summary.attainment),
        "effective quality": (min_effective_quality, summary.effective_quality),
    }
    raise typer.Exit(exit_status(done.late_s, minimums))


def _write_results(
    folder: Path | None, title: str, done: LoadRun, summary: Summary, facts: dict[str, object]
) -> None:
    seen = {
        "statuses": done.statuses(),
        "late": done.late,
        "lag_p99_ms": round(1e3 * done.lag_p99_s, 3),
    }
    write(folder, "load", {"load": facts} | seen | {"summary": summary.to_dict()})
    if folder is not None:
        write_report(folder / "load.html", title, done, summary, facts)


def exit_status(late_s: float | None, minimums: Mapping[str, tuple[float | None, float]]) -> int:
    """Print what a run missed, and return 2 for a late generator, 1 for a missed minimum, or 0.

    `late_s` is the generator's lag if it was the bottleneck. `minimums` holds (minimum, got) by the
    name of a figure; a minimum of None is not checked.
    """
    missed = {
        name: (minimum, got)
        for name, (minimum, got) in minimums.items()
        if minimum is not None and not got >= minimum
    }
    for name, (minimum, got) in missed.items():
        err.print(f"{name}: expected at least {minimum:g}, got {format_figure(got, '.4f')}")
    if late_s is None:
        return int(bool(missed))
    err.print(
        f"the generator sent requests late by {1e3 * late_s:.2f} ms (p99): these figures are "
        "its limit; use more --processes or cores, or a lower --rate"
    )
    return 2


def _summary_table(summary: Summary) -> Table:
    title = (
        f"attainment {100 * summary.attainment:.2f} %, effective quality "
        f"{100 * summary.effective_quality:.2f} %, {summary.goodput_rps:.1f} requests/s on time"
    )
    head = ("budget class", "offered", "attainment", "effective quality", *SHOWN_QUANTILES)
    table = Table(*head, title=title)
    for one in summary.classes:
        quantiles = (format_figure(one.latency_ms["total"][q], unit=" ms") for q in SHOWN_QUANTILES)
        table.add_row(
            f"{one.name}, {one.budget_ms:g} ms",
            str(one.offered),
            format_figure(100 * one.attainment),
            format_figure(100 * one.effective_quality),
            *quantiles,
        )
    return table

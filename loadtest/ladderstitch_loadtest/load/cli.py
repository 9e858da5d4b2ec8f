"""Commands `run`, `burst` and `agree`: open-loop load of images on a real server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from ladderstitch.bundles import find_bundle
from ladderstitch.cli.console import err, out
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch_loadtest.benchmarks.burst import BurstResult, measure_burst
from ladderstitch_loadtest.cli_options import (
    MinAttainment,
    ModelName,
    OutFolder,
    Processes,
    Rounds,
    RunningServer,
    RunSeconds,
    Target,
)
from ladderstitch_loadtest.load.arrival_options import ArrivalFile, Arrivals, Cv2, arrival_times
from ladderstitch_loadtest.load.generator import LoadRun, measure
from ladderstitch_loadtest.load.outcome import Summary
from ladderstitch_loadtest.load.report import write_report
from ladderstitch_loadtest.load.targets import find_target
from ladderstitch_loadtest.load.traces import BudgetClass, Trace
from ladderstitch_loadtest.servers.processes import StartedServer, ladderstitch_server
from ladderstitch_loadtest.servers.results_io import write
from ladderstitch_loadtest.simulation import agreement as agreements
from ladderstitch_loadtest.simulation.profiles import Family

Cpu = Annotated[
    int | None,
    typer.Option(help="CPU reserved for the generator; the started server gets the others."),
]
Budgets = Annotated[
    list[str],
    typer.Option("--budget", help="Budget class as NAME:MILLISECONDS[:SHARE]; repeatable."),
]
MinQuality = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Exit with 1 if effective quality is below this value."),
]
Policies = Annotated[
    list[str], typer.Option(help="Policy to compare, or `fixed N` for one variant; repeatable.")
]
EMBEDDED = "fashion-mnist"


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
    raise typer.Exit(_exit_status(done, summary, min_attainment, min_effective_quality))


def burst(
    budget_ms: Annotated[
        float, typer.Option(help="Budget of every request, as a hard deadline.")
    ] = 50.0,
    rounds: Rounds = 3,
    policy: Policies = [  # noqa: B006 # typer reads it only
        "adaptive",
        "slackfit",
        "fixed 0",
        "fixed 1",
        "fixed 27",
    ],
    cpu: Cpu = None,
    folder: OutFolder = None,
) -> None:
    """Compare policies in a tenfold burst of 2 s on a server of the embedded model.

    The burst's rate is 0.8 of the server's capacity on its fastest variant.
    """
    with _embedded_server(cpu) as server, err.status("starting") as status:
        found = asyncio.run(
            measure_burst(
                server,
                find_target(server.address, "ladderstitch", "", hard=True),
                policies=policy,
                budget_s=budget_ms / 1e3,
                rounds=rounds,
                cpus=None if cpu is None else [cpu],
                advance=status.update,
            )
        )
    out.print(_burst_table(found))
    out.print(f"free engine to next batch: at most {found.dispatch_p99_ms:g} ms at p99")
    write(folder, "burst", found.to_dict())


def agree(
    rate: Annotated[float, typer.Option(help="Mean requests/s.")] = 250.0,
    seconds: Annotated[float, typer.Option(help="Length of each run.")] = 3.0,
    rounds: Rounds = 5,
    policy: Policies = ["adaptive", "slackfit"],  # noqa: B006 # typer reads it only
    cpu: Cpu = None,
    folder: OutFolder = None,
) -> None:
    """Validate the simulator against a server of the embedded model: policies on five traces."""
    family = Family.from_bundle(VisionBundle.load(find_bundle(EMBEDDED)))
    with _embedded_server(cpu) as server, err.status("starting") as status:
        found = asyncio.run(
            agreements.compare_with_simulator(
                server.address,
                find_target(server.address, "ladderstitch", "", hard=True),
                family,
                policies=policy,
                rate=rate,
                seconds=seconds,
                rounds=rounds,
                cpus=None if cpu is None else [cpu],
                advance=status.update,
            )
        )
    table = Table("trace", "policy", "attainment", "simulated", "effective quality", "simulated")
    for pair in found.pairs:
        table.add_row(
            pair.trace,
            pair.policy,
            f"{100 * pair.attainment:.2f}",
            f"{100 * pair.simulated_attainment:.2f} ({pair.attainment_error:+.2f})",
            f"{100 * pair.effective_quality:.2f}",
            f"{100 * pair.simulated_quality:.2f} ({pair.quality_error:+.2f})",
        )
    out.print(table)
    write(folder, "agreement", found.to_dict())


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


@contextmanager
def _embedded_server(cpu: int | None) -> Iterator[StartedServer]:
    """Run a server of the embedded model on all CPUs but `cpu` during the `with` block."""
    before = os.sched_getaffinity(0)
    if cpu is not None:
        os.sched_setaffinity(0, before - {cpu} or before)
    try:
        with ladderstitch_server("--no-ray") as server:
            yield server
    finally:
        os.sched_setaffinity(0, before)


def _exit_status(
    done: LoadRun, summary: Summary, min_attainment: float | None, min_quality: float | None
) -> int:
    status = 0
    for name, minimum, got in (
        ("attainment", min_attainment, summary.attainment),
        ("effective quality", min_quality, summary.effective_quality),
    ):
        if minimum is not None and got < minimum:
            err.print(f"{name}: expected at least {minimum:.4f}, got {got:.4f}")
            status = 1
    if done.late:
        report_late_generator(done.lag_p99_s)
        status = 2
    return status


def report_late_generator(lag_p99_s: float) -> None:
    """Print that the generator was the bottleneck of a run."""
    err.print(
        f"the generator sent requests late by {1e3 * lag_p99_s:.2f} ms (p99): these figures are "
        "its limit; use more --processes or cores, or a lower --rate"
    )


def _summary_table(summary: Summary) -> Table:
    table = Table(
        "budget class",
        "offered",
        "attainment",
        "effective quality",
        "p50",
        "p99",
        "p99.9",
        title=f"attainment {100 * summary.attainment:.2f} %, effective quality "
        f"{100 * summary.effective_quality:.2f} %, {summary.goodput_rps:.1f} requests/s on time",
    )
    for one in summary.classes:
        quantiles = [f"{one.latency_ms['total'][q]:.2f} ms" for q in ("p50", "p99", "p99.9")]
        table.add_row(
            f"{one.name}, {one.budget_ms:g} ms",
            str(one.offered),
            f"{100 * one.attainment:.2f}",
            f"{100 * one.effective_quality:.2f}",
            *quantiles,
        )
    return table


def _burst_table(found: BurstResult) -> Table:
    table = Table(
        "policy",
        "attainment in the burst",
        "effective quality",
        "quality before",
        "in the burst",
        "1 s after",
        title=f"{found.base_rps:g} -> {10 * found.base_rps:g} requests/s",
    )
    for row in found.rows:
        figures = (
            row.attainment_burst,
            row.effective_quality,
            row.quality_before,
            row.quality_burst,
            row.quality_recovered,
        )
        table.add_row(row.policy, *(f"{100 * figure:.2f}" for figure in figures))
    return table

"""`ladderstitch-loadtest run`, `agree` and `burst`: open-loop load on a real server."""

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
from ladderstitch.vision.bundle import Bundle
from ladderstitch_loadtest.benchmarks import burst as bursts
from ladderstitch_loadtest.load.arrival_options import ArrivalFile, Arrivals, Cv2, arrival_times
from ladderstitch_loadtest.load.generator import Measured, measure
from ladderstitch_loadtest.load.outcome import Summary
from ladderstitch_loadtest.load.report import write_report
from ladderstitch_loadtest.load.targets import Kind, find_target
from ladderstitch_loadtest.load.traces import BudgetClass, Trace
from ladderstitch_loadtest.servers.processes import Served, ladderstitch_server
from ladderstitch_loadtest.servers.results_io import write
from ladderstitch_loadtest.simulation import agreement as agreements
from ladderstitch_loadtest.simulation.profiles import of_bundle

Cpu = Annotated[
    int | None, typer.Option(help="CPU for the generator; the server that is started gets others.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for NAME.json.")]
EMBEDDED = "fashion-mnist"


def run(
    address: Annotated[str, typer.Argument(help="host:port of a running server.")],
    rate: Annotated[float, typer.Option(min=0.1, help="Mean requests a second.")] = 100.0,
    seconds: Annotated[float, typer.Option(min=0.1)] = 10.0,
    arrivals: Arrivals = "poisson",
    cv2: Cv2 = 4.0,
    file: ArrivalFile = None,
    budget: Annotated[
        list[str], typer.Option(help="NAME:MILLISECONDS[:SHARE], repeatable: the mix of budgets.")
    ] = ["budget:20"],  # noqa: B006 # typer reads it only
    soft: Annotated[bool, typer.Option(help="Late answers are welcome.")] = False,
    target: Annotated[Kind, typer.Option(help="`oip` for any server of that protocol.")] = (
        "ladderstitch"
    ),
    model: Annotated[str, typer.Option(help="Name; needed for `oip`.")] = "",
    processes: Annotated[int, typer.Option(min=1, help="Generators side by side.")] = 1,
    seed: Annotated[int, typer.Option(help="Of arrivals and budgets.")] = 1,
    min_attainment: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit with 1 below it.")
    ] = None,
    min_effective_quality: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit with 1 below it.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for load.json and load.html.")
    ] = None,
) -> None:
    """Open-loop load: requests leave when due, whether or not others were answered.

    Exits with 1 when a bar is missed, with 2 when the generator was the bottleneck.
    """
    rng = np.random.default_rng(seed)
    times = arrival_times(arrivals, rate, seconds, cv2, file, rng)
    trace = Trace.draw(arrivals, times, [_budget_class(text) for text in budget], rng)
    measured = measure(
        address, find_target(address, target, model, hard=not soft), trace, processes=processes
    )
    summary = measured.outcome.summary()
    out.print(_table(summary))
    facts = {
        "server": address,
        "arrivals": arrivals,
        "rate": rate,
        "seconds": seconds,
        "seed": seed,
        "budgets": ", ".join(budget),
        "processes": processes,
    }
    seen = {
        "statuses": measured.statuses(),
        "late": measured.late,
        "lag_p99_ms": round(1e3 * measured.lag_p99_s, 3),
    }
    write(folder, "load", {"load": facts} | seen | {"summary": summary.to_dict()})
    if folder is not None:
        write_report(folder / "load.html", f"Load on {address}", measured, summary, facts)
    raise typer.Exit(_verdict(measured, summary, min_attainment, min_effective_quality))


def agree(
    rate: Annotated[float, typer.Option(help="Requests a second.")] = 250.0,
    seconds: Annotated[float, typer.Option(help="Length of each run.")] = 3.0,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each, interleaved.")] = 5,
    policy: Annotated[list[str], typer.Option(help="Repeatable; `fixed N` too.")] = [  # noqa: B006
        "adaptive",
        "slackfit",
    ],
    cpu: Cpu = None,
    folder: Out = None,
) -> None:
    """The embedded model's server beside its simulation: policies on five traces."""
    family = of_bundle(Bundle.load(find_bundle(EMBEDDED)))
    with _server(cpu) as server, err.status("starting") as status:
        target = find_target(server.address, "ladderstitch", "", hard=True)
        found = asyncio.run(
            agreements.compare_with_simulator(
                server.address,
                target,
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


def burst(
    budget_ms: Annotated[float, typer.Option(help="Of every request.")] = 50.0,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each, interleaved.")] = 3,
    policy: Annotated[list[str], typer.Option(help="Repeatable; `fixed N` too.")] = [  # noqa: B006
        "adaptive",
        "slackfit",
        "fixed 0",
        "fixed 1",
        "fixed 27",
    ],
    cpu: Cpu = None,
    folder: Out = None,
) -> None:
    """A tenfold burst of 2 s on the embedded model's server, 0.8 of its capacity at its height."""
    with _server(cpu) as server, err.status("starting") as status:
        target = find_target(server.address, "ladderstitch", "", hard=True)
        found = asyncio.run(
            bursts.measure_burst(
                server,
                target,
                policies=policy,
                budget_s=budget_ms / 1e3,
                rounds=rounds,
                cpus=None if cpu is None else [cpu],
                advance=status.update,
            )
        )
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
        table.add_row(
            row.policy,
            *(
                f"{100 * figure:.2f}"
                for figure in (
                    row.attainment_burst,
                    row.effective_quality,
                    row.quality_before,
                    row.quality_burst,
                    row.quality_recovered,
                )
            ),
        )
    out.print(table)
    out.print(f"free engine to next batch: at most {found.dispatch_p99_ms:g} ms at p99")
    write(folder, "burst", found.to_dict())


@contextmanager
def _server(cpu: int | None) -> Iterator[Served]:
    """A server of the embedded model on all CPUs but that one."""
    before = os.sched_getaffinity(0)
    if cpu is not None:
        os.sched_setaffinity(0, before - {cpu} or before)
    try:
        with ladderstitch_server("--no-ray") as served:
            yield served
    finally:
        os.sched_setaffinity(0, before)


def _verdict(
    measured: Measured, summary: Summary, attainment: float | None, quality: float | None
) -> int:
    status = 0
    for name, bar, got in (
        ("attainment", attainment, summary.attainment),
        ("effective quality", quality, summary.effective_quality),
    ):
        if bar is not None and got < bar:
            err.print(f"{name}: expected at least {bar:.4f}, got {got:.4f}")
            status = 1
    if measured.late:
        err.print(
            f"the generator was late by {1e3 * measured.lag_p99_s:.2f} ms (p99): give it more "
            "--processes or cores, or a lower --rate; these figures are its limit"
        )
        status = 2
    return status


def _table(summary: Summary) -> Table:
    table = Table(
        "budget class",
        "offered",
        "attainment",
        "effective quality",
        "p50",
        "p99",
        "p99.9",
        title=f"attainment {100 * summary.attainment:.2f} %, effective quality "
        f"{100 * summary.effective_quality:.2f} %, {summary.goodput_rps:.1f} in time a second",
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


def _budget_class(text: str) -> BudgetClass:
    name, *numbers = text.split(":")
    try:
        milliseconds, share = map(float, (*numbers, "1")[:2])
    except ValueError as error:
        raise typer.BadParameter(f"expected NAME:MILLISECONDS[:SHARE], got {text!r}") from error
    if len(numbers) > 2 or milliseconds <= 0 or share <= 0:
        raise typer.BadParameter(f"expected positive milliseconds and share, got {text!r}")
    return BudgetClass(name, milliseconds / 1e3, share)

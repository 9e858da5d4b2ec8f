"""Commands `compare`, `agree`, `decisions` and `replay` around the simulator."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import track
from rich.table import Table

from ladderstitch.bundles import find_bundle
from ladderstitch.cli.console import err, out, progress_bar, user_errors
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch_loadtest.cli_options import (
    Cpu,
    OutFolder,
    Policies,
    Rounds,
    Seed,
    embedded_server,
)
from ladderstitch_loadtest.load.targets import find_target
from ladderstitch_loadtest.servers.results_io import write
from ladderstitch_loadtest.simulation import agreement as agreements
from ladderstitch_loadtest.simulation import decisions as decision_times
from ladderstitch_loadtest.simulation import plots, policy_sweep, scenarios
from ladderstitch_loadtest.simulation import replay as replays
from ladderstitch_loadtest.simulation.comparison_table import column_names, format_page, row_cells
from ladderstitch_loadtest.simulation.profiles import Family, supernet

EMBEDDED = "fashion-mnist"
"""The family of the embedded bundle."""
Grid = Literal["full", "short"]
Families = Annotated[
    list[str],
    typer.Option("--family", help="`supernet`, or the name or folder of a bundle; repeatable."),
]


def compare(
    family: Families = ["supernet", "fashion-mnist"],  # noqa: B006 # typer reads it only
    replicas: Annotated[
        int, typer.Option(min=1, help="Replicas of `supernet`; other families have one.")
    ] = 8,
    grid: Annotated[
        Grid,
        typer.Option(help="Scenarios; `short` traces are compared with the oracle, too."),
    ] = "full",
    seeds: Annotated[
        int, typer.Option(min=1, help="Runs of each policy on each scenario, paired by seed.")
    ] = 10,
    replay: Annotated[
        list[Path] | None,
        typer.Option(help="CSV file of arrivals: Azure's LLM format or seconds; repeatable."),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that simulate; default: one per CPU.")
    ] = os.cpu_count() or 1,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for table and plot; unset: print only.")
    ] = None,
) -> None:
    """Compare all policies on a grid of simulated traces, by attainment and effective quality.

    The full grid takes about ten minutes on two cores.
    """
    pairs = [
        (one, scenario)
        for one in map(_find_family, family)
        for scenario in (
            scenarios.short_grid()
            if grid == "short"
            else scenarios.grid(replicas if one.name == "supernet" else 1, tuple(replay or ()))
        )
    ]
    with progress_bar() as progress:
        total = sum(policy_sweep.count_runs(one, scenario, seeds) for one, scenario in pairs)
        task = progress.add_task("simulating", total=total)
        found = list(
            policy_sweep.sweep_policies(
                pairs, seeds, workers, lambda runs: progress.advance(task, runs)
            )
        )
    table = Table(*column_names(found))
    for comparison in found:
        table.add_row(*row_cells(comparison))
    out.print(table)
    if folder is not None:
        name = "policies" if grid == "full" else "policies-short"
        write(folder, name, {"comparisons": [comparison.to_dict() for comparison in found]})
        (folder / f"{name}.md").write_text(format_page(found), encoding="utf-8")
        plots.plot_comparisons(found, folder / f"{name}.png")


def agree(
    rate: Annotated[float, typer.Option(help="Mean requests/s.")] = 250.0,
    seconds: Annotated[float, typer.Option(help="Length of each run.")] = 3.0,
    rounds: Rounds = 5,
    policy: Policies = ["adaptive", "slackfit"],  # noqa: B006 # typer reads it only
    cpu: Cpu = None,
    folder: OutFolder = None,
) -> None:
    """Validate the simulator against a server of the embedded model: policies on five traces."""
    family = _find_family(EMBEDDED)
    with embedded_server(cpu) as server, err.status("starting") as status:
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
    out.print(_agreement_table(found))
    write(folder, "agreement", found.to_dict())


def _agreement_table(found: agreements.Agreement) -> Table:
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
    return table


def decisions(
    family: Families = ["supernet", "fashion-mnist"],  # noqa: B006 # typer reads it only
    calls: Annotated[
        int, typer.Option(min=100, help="Decisions of each policy at each queue length.")
    ] = 3000,
    seed: Seed = 1,
    folder: OutFolder = None,
) -> None:
    """Measure how long a decision takes with queues of 1 to 1,000 requests."""
    rows = [
        row
        for one in map(_find_family, family)
        for policy in ("adaptive", decision_times.CASCADES, "slackfit")
        if one.cascades.cascades or policy != decision_times.CASCADES
        for row in decision_times.measure(one, policy, calls, seed)
    ]
    table = Table("family", "policy", "queue", "p50", "p99")
    for row in rows:
        table.add_row(
            row.family, row.policy, str(row.queue), f"{row.p50_us} us", f"{row.p99_us} us"
        )
    out.print(table)
    write(folder, "decisions", {"rows": [row.to_dict() for row in rows]})


def replay(
    file: Annotated[Path, typer.Argument(help="MODEL-PID.jsonl of `ladderstitch serve --record`.")],
    policy: Annotated[
        list[str], typer.Option(help="Policy to simulate, or `fixed N`; repeatable.")
    ] = [*policy_sweep.POLICIES],  # noqa: B006 # typer reads it only
) -> None:
    """Repeat the decisions in a server's record, and simulate other policies on its arrivals.

    Exits with 1 if the planner decides otherwise than it did in the server.
    """
    with user_errors():
        found = replays.replay(file)
    total = found.admissions + found.decisions
    out.print(f"{found.same} of {total} admissions and decisions are the same")
    for difference in found.differences:
        err.print(difference)
    table = Table("policy", "attainment", "effective quality")
    rows = {f"recorded: {found.settings.policy}": found.recorded}
    for name in track(policy, "simulating", console=err, transient=True):
        rows[f"simulated: {name}"] = found.simulate(name)
    for title, figures in rows.items():
        table.add_row(
            title, f"{100 * figures.attainment:.2f} %", f"{100 * figures.effective_quality:.2f} %"
        )
    out.print(table)
    if not found.exact:
        raise typer.Exit(1)


def _find_family(name: str) -> Family:
    if name == "supernet":
        return supernet()
    return Family.from_bundle(VisionBundle.load(find_bundle(name)))

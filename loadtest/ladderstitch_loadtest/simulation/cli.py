"""`ladderstitch-loadtest compare`: the policy laboratory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import track
from rich.table import Table

from ladderstitch.bundles import find_bundle
from ladderstitch.cli.console import err, out, progress_bar, user_errors
from ladderstitch.vision.bundle import Bundle
from ladderstitch_loadtest.servers.results_io import write
from ladderstitch_loadtest.simulation import decisions as decision_times
from ladderstitch_loadtest.simulation import plots, policy_sweep, scenarios
from ladderstitch_loadtest.simulation import replay as replays
from ladderstitch_loadtest.simulation.comparison_table import cells, columns, standings
from ladderstitch_loadtest.simulation.profiles import Family, of_bundle, supernet

Grid = Literal["full", "short"]


def compare(
    family: Annotated[
        list[str], typer.Option(help="`supernet`, or the name or folder of a bundle; repeatable.")
    ] = ["supernet", "fashion-mnist"],  # noqa: B006 # typer reads it only
    replicas: Annotated[int, typer.Option(min=1, help="Of `supernet`; others have one.")] = 8,
    grid: Annotated[
        Grid, typer.Option(help="`short` traces are few, and have the oracle beside them.")
    ] = "full",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, paired.")] = 10,
    replay: Annotated[
        list[Path] | None,
        typer.Option(help="CSV file of arrivals: Azure's LLM format or seconds; repeatable."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for table and plot.")] = None,
) -> None:
    """Every policy on a grid of traces, simulated: attainment and effective quality.

    The full grid takes some ten minutes on two cores.
    """
    pairs = [
        (one, scenario)
        for one in map(_family, family)
        for scenario in (
            scenarios.short_grid()
            if grid == "short"
            else scenarios.grid(replicas if one.name == "supernet" else 1, tuple(replay or ()))
        )
    ]
    with progress_bar() as progress:
        total = sum(policy_sweep.runs_of(one, scenario, seeds) for one, scenario in pairs)
        task = progress.add_task("simulating", total=total)
        found = list(
            policy_sweep.compare(pairs, seeds, workers, lambda runs: progress.advance(task, runs))
        )
    table = Table(*columns(found))
    for comparison in found:
        table.add_row(*cells(comparison))
    out.print(table)
    if folder is not None:
        name = "policies" if grid == "full" else "policies-short"
        write(folder, name, {"comparisons": [comparison.to_dict() for comparison in found]})
        (folder / f"{name}.md").write_text(standings(found), encoding="utf-8")
        plots.compared(found, folder / f"{name}.png")


def decisions(
    family: Annotated[
        list[str], typer.Option(help="`supernet`, or the name or folder of a bundle; repeatable.")
    ] = ["supernet", "fashion-mnist"],  # noqa: B006 # typer reads it only
    calls: Annotated[int, typer.Option(min=100, help="Of each policy at each length.")] = 3000,
    seed: Annotated[int, typer.Option(help="Of the queues.")] = 1,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for decisions.json.")] = None,
) -> None:
    """How long a decision takes at queues of 1 to 1,000 requests."""
    rows = [
        row
        for one in map(_family, family)
        for policy in ("adaptive", "slackfit")
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
        list[str], typer.Option(help="`slackfit` and so on, or `fixed N`; repeatable.")
    ] = [*policy_sweep.POLICIES],  # noqa: B006 # typer reads it only
) -> None:
    """A server's record, once more: the same decisions, and what other policies make of it.

    Fails if the planner decides otherwise than it did in the server.
    """
    with user_errors():
        found = replays.replay(file)
    made = found.admissions + found.decisions
    out.print(f"{found.same} of {made} admissions and decisions are made again")
    for difference in found.differences:
        err.print(difference)
    table = Table("policy", "attainment", "effective quality")
    rows = {f"recorded: {found.settings.policy}": found.recorded}
    for name in track(policy, "simulating", console=err, transient=True):
        rows[f"simulated: {name}"] = found.simulated(name)
    for title, figures in rows.items():
        table.add_row(
            title, f"{100 * figures.attainment:.2f} %", f"{100 * figures.effective_quality:.2f} %"
        )
    out.print(table)
    if not found.exact:
        raise typer.Exit(1)


def _family(name: str) -> Family:
    return supernet() if name == "supernet" else of_bundle(Bundle.load(find_bundle(name)))

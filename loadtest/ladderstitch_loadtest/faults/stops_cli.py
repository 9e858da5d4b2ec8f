"""Command `stops`: workers and ranks that are killed or stopped at random moments under load."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ladderstitch.bundles import HOME_VARIABLE
from ladderstitch.cli.console import err, out, progress_bar
from ladderstitch_loadtest.cli_options import OutFolder, Seed
from ladderstitch_loadtest.faults.fuzz_cli import write_chat_model
from ladderstitch_loadtest.faults.stops.load import IMAGES, TEXT
from ladderstitch_loadtest.faults.stops.report import StopsReport
from ladderstitch_loadtest.faults.stops.run import Deployment, run_stops
from ladderstitch_loadtest.servers.process_supervisor import (
    replicas_and_gateways,
    wait_until_serving,
)
from ladderstitch_loadtest.servers.results_io import write

CONFIG = "runtime: torch\ntensor_parallel_size: {ranks}\nhttp_port: 0\n"
MAX_PRINTED = 40


def stops(
    kills: Annotated[int, typer.Option(min=0, help="SIGKILLs of each run.")] = 20,
    stops: Annotated[int, typer.Option(min=0, help="SIGSTOPs of each run, up to 30 s each.")] = 10,
    target: Annotated[
        str | None, typer.Option(help="Run only this one: `replica` or `gateway`.")
    ] = None,
    seed: Seed = 1,
    folder: OutFolder = None,
) -> None:
    """Kill and stop workers and ranks under load; exit with 1 unless each request ends as it must.

    One run goes directly to a replica with two ranks, one through a gateway to two replicas with
    one rank each. Each answer is compared with that of the quiet server.
    """
    started = time.monotonic()
    runs = {"replica": (1, 2), "gateway": (2, 1)}
    if target is not None and target not in runs:
        raise typer.BadParameter(f"target: expected one of {', '.join(runs)}, got {target!r}")
    found = []
    with progress_bar() as progress:
        for name in runs if target is None else (target,):
            replicas, ranks = runs[name]
            task = progress.add_task(name, total=kills + stops)
            with _deployed(name, replicas, ranks) as deployment:
                run = run_stops(deployment, kills, stops, seed, partial(progress.advance, task))
                found.append(asyncio.run(run))
    out.print(_table(found, time.monotonic() - started))
    failures = [f"{run.target}: {line}" for run in found for line in run.list_failures()]
    for line in failures[:MAX_PRINTED]:
        err.print(f"[bold red]{line}[/]", highlight=False)
    write(folder, "stops", {"seed": seed, "runs": [run.to_dict() for run in found]})
    raise typer.Exit(int(bool(failures)))


@contextmanager
def _deployed(name: str, replicas: int, ranks: int) -> Iterator[Deployment]:
    """Run replicas that can find the language model, and a gateway if there are several."""
    with tempfile.TemporaryDirectory() as home, _model_home(home):
        write_chat_model(Path(home) / TEXT)
        config = Path(home) / "serve.yaml"
        config.write_text(CONFIG.format(ranks=ranks))
        flags = ("--config", str(config), "--model", IMAGES)
        gateways = int(replicas > 1)
        with replicas_and_gateways(replicas, gateways, *flags) as (behind, front):
            if front:
                wait_until_serving([front[0]], replicas)
            yield Deployment(name, behind, front[0] if front else None)


@contextmanager
def _model_home(home: str) -> Iterator[None]:
    before = os.environ.get(HOME_VARIABLE)
    os.environ[HOME_VARIABLE] = home
    try:
        yield
    finally:
        os.environ.pop(HOME_VARIABLE)
        if before is not None:
            os.environ[HOME_VARIABLE] = before


def _table(found: Sequence[StopsReport], seconds: float) -> Table:
    """Return the figures of the runs."""
    table = Table("", *(run.target for run in found), title=f"{seconds:.0f} s")
    rows = [run.to_dict() for run in found]
    names = ("seconds_to_not_serving", "seconds_to_serving", "seconds_of_trouble")
    table.add_row("requests", *(str(row["requests"]) for row in rows))
    for kind in ("pixels", "files", "streams", "chats"):
        table.add_row(kind, *(_ends(run, kind) for run in found))
    for name in names:
        table.add_row(name.replace("_", " "), *(_range(row[name]) for row in rows))
    table.add_row("longest request", *(f"{row['longest_s']} s" for row in rows))
    table.add_row("failures", *(str(len(run.list_failures())) for run in found))
    return table


def _ends(run: StopsReport, kind: str) -> str:
    ends = [end.end for end in run.ends if end.kind == kind]
    return ", ".join(f"{end} {ends.count(end)}" for end in sorted(set(ends)))


def _range(values: object) -> str:
    """Return the number of values, their median and the largest one."""
    if not isinstance(values, list) or not values:
        return "none"
    return f"{len(values)}: median {values[len(values) // 2]:.2f} s, longest {values[-1]:.2f} s"

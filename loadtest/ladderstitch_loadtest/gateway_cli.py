"""`ladderstitch-loadtest hop` and `kills`: what a gateway costs, and what it is for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ladderstitch.cli.console import err, out
from ladderstitch_loadtest import hop as hops
from ladderstitch_loadtest.files import write
from ladderstitch_loadtest.kills import Killing, kill_under_load, until_all_serve
from ladderstitch_loadtest.stage import Process, stage

Out = Annotated[Path | None, typer.Option("--out", help="Folder for NAME.json.")]


def hop(
    rounds: Annotated[int, typer.Option(min=1, help="Turns of direct and gateway.")] = 15,
    folder: Out = None,
) -> None:
    """Latency of one caller straight to a replica and through a gateway, taking turns."""
    with err.status("starting"), stage(replicas=1) as ((replica,), (gateway,)):
        until_all_serve([gateway.metrics], 1)
        found = asyncio.run(hops.measure(replica.address, gateway.address, rounds))
    table = Table("", "direct", "gateway", "added", title="one caller, fastest stitch, one image")
    table.add_row(
        "p50", f"{found.direct_p50_ms} ms", f"{found.gateway_p50_ms} ms", f"{found.added_p50_ms} ms"
    )
    table.add_row(
        "p95", f"{found.direct_p95_ms} ms", f"{found.gateway_p95_ms} ms", f"{found.added_p95_ms} ms"
    )
    out.print(table)
    write(folder, "hop", found.to_dict())


def kills(
    rate: Annotated[float, typer.Option(help="Requests a second.")] = 50.0,
    seconds: Annotated[float, typer.Option(help="Length of each run.")] = 12.0,
    deadline: Annotated[float, typer.Option(help="Of every request, seconds.")] = 20.0,
    folder: Out = None,
) -> None:
    """`kill -9` of one of two replicas, of both, of a gateway; exits with 1 if a request is lost.

    Without Ray: whatever is killed is started again at once, as a service manager does.
    """
    with err.status("starting") as status, stage(replicas=2, gateways=2) as (replicas, gateways):
        runs: dict[str, Callable[[], None]] = {
            "one of two replicas": replicas[0].kill,
            "both replicas": lambda: _kill(replicas),
            "one of two gateways": gateways[0].kill,
            "both gateways": lambda: _kill(gateways),
        }
        found = []
        for name, kill in runs.items():
            status.update(f"killing {name}")
            until_all_serve([gateway.metrics for gateway in gateways], len(replicas))
            found.append(
                asyncio.run(
                    kill_under_load(
                        gateways[0].address, name, kill, rate=rate, seconds=seconds,
                        deadline_s=deadline,
                    )
                )
            )  # fmt: skip
    out.print(table_of(found))
    write(folder, "kills", {"runs": [run.to_dict() for run in found]})
    raise typer.Exit(int(any(run.answered < run.requests for run in found)))


def _kill(processes: list[Process]) -> None:
    for process in processes:
        process.kill()


def table_of(found: list[Killing]) -> Table:
    table = Table("killed", "answered", "hole", "slowest", "p50", "p99")
    for run in found:
        table.add_row(
            run.killed,
            f"{run.answered} of {run.requests}",
            f"{run.hole_s:.2f} s",
            f"{run.worst_s:.2f} s",
            f"{run.p50_ms:.1f} ms",
            f"{run.p99_ms:.1f} ms",
        )
    return table

"""`ladderstitch-loadtest hop` and `kills`: what a gateway costs, and what it is for."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ladderstitch.cli.console import err, out
from ladderstitch_loadtest.benchmarks import gateway_overhead as hops
from ladderstitch_loadtest.faults.fault_injection import Killing, kill_under_load, until_all_serve
from ladderstitch_loadtest.faults.fuzz_runner import process_tree
from ladderstitch_loadtest.servers.process_supervisor import Process, stage
from ladderstitch_loadtest.servers.processes import StartFailed, command_line, ladderstitch_server
from ladderstitch_loadtest.servers.results_io import write

Out = Annotated[Path | None, typer.Option("--out", help="Folder for NAME.json.")]


def hop(
    rounds: Annotated[int, typer.Option(min=1, help="Turns of direct and gateway.")] = 15,
    folder: Out = None,
) -> None:
    """Latency of one caller straight to a replica and through a gateway, taking turns."""
    with err.status("starting"), stage(replicas=1) as ((replica,), (gateway,)):
        until_all_serve([gateway.metrics], 1)
        found = asyncio.run(hops.measure(replica.address, gateway.address, rounds))
    table = Table("", "direct", "gateway", "added", title="one caller, fastest variant, one image")
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
    ray: Annotated[
        bool,
        typer.Option(
            "--ray/--no-ray",
            help="Serve restarts what was killed; without Ray, a supervisor does at once.",
        ),
    ] = True,
    folder: Out = None,
) -> None:
    """`kill -9` of one of two replicas, of both, of gateways; exits with 1 if a request is lost."""
    found = []
    with err.status("starting") as status, _on_ray() if ray else _alone() as scene:
        for name, kill in scene.kills.items():
            status.update(f"killing {name}")
            until_all_serve([scene.metrics], 2)
            run = kill_under_load(
                scene.address, name, kill, rate=rate, seconds=seconds, deadline_s=deadline
            )
            found.append(asyncio.run(run))
            err.print(f"{name}: {found[-1].answered} of {found[-1].requests} answered")
    out.print(table_of(found))
    write(folder, "kills-ray" if ray else "kills", {"runs": [run.to_dict() for run in found]})
    raise typer.Exit(int(any(run.answered < run.requests for run in found)))


@dataclass(frozen=True, slots=True)
class Scene:
    """Two replicas behind two gateways on one port, and ways to kill them."""

    address: str
    metrics: str
    kills: dict[str, Callable[[], None]]


@contextmanager
def _alone() -> Iterator[Scene]:
    with stage(replicas=2, gateways=2) as (replicas, gateways):
        yield Scene(
            gateways[0].address,
            gateways[0].metrics,
            {
                "one of two replicas": replicas[0].kill,
                "both replicas": lambda: _kill(replicas),
                "one of two gateways": gateways[1].kill,
                "both gateways": lambda: _kill(gateways),
            },
        )


@contextmanager
def _on_ray() -> Iterator[Scene]:
    with ladderstitch_server("--ray", "--replicas", "2") as served:
        yield Scene(
            served.address,
            served.metrics.removesuffix("/metrics"),
            {
                "one of two replicas": lambda: _kill_actors(served.pid, "replica", 1),
                "both replicas": lambda: _kill_actors(served.pid, "replica", 2),
                "one of two gateways": lambda: _kill_actors(served.pid, "gateway", 1),
                "both gateways": lambda: _kill_actors(served.pid, "gateway", 2),
            },
        )


def _kill_actors(server: int, deployment: str, count: int) -> None:
    """`kill -9` of so many of a deployment's processes, as they are at that time."""
    found = pids_of(server, deployment)
    if len(found) < count:
        raise StartFailed(f"{len(found)} processes of {deployment!r}, expected {count}")
    for pid in found[:count]:
        os.kill(pid, signal.SIGKILL)


def pids_of(server: int, deployment: str) -> list[int]:
    """Processes of a Serve deployment below a server."""
    title = f"ray::ServeReplica:ladderstitch:{deployment}"
    return [pid for pid in process_tree(server) if command_line(pid).startswith(title)]


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

"""Commands `kills` and `malformed`: load with killed processes, and requests that are wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from rich.progress import Progress
from rich.table import Table

from ladderstitch.cli.console import err, out, progress_bar
from ladderstitch.v1 import inference_pb2, inference_pb2_grpc
from ladderstitch_loadtest.cli_options import OutFolder, Seed
from ladderstitch_loadtest.faults import fuzz_runner
from ladderstitch_loadtest.faults.fault_injection import FaultResult, kill_under_load
from ladderstitch_loadtest.faults.fuzz_runner import process_tree
from ladderstitch_loadtest.faults.fuzz_text import TextCases
from ladderstitch_loadtest.faults.fuzz_vision import ImageCases
from ladderstitch_loadtest.servers.process_supervisor import (
    SupervisedProcess,
    replicas_and_gateways,
    wait_until_serving,
)
from ladderstitch_loadtest.servers.processes import (
    StartedServer,
    StartError,
    command_line,
    ladderstitch_server,
)
from ladderstitch_loadtest.servers.results_io import write
from ladderstitch_loadtest.servers.tiny_language import write_tiny

MAX_PRINTED = 20


def kills(
    rate: Annotated[float, typer.Option(help="Mean requests/s.")] = 50.0,
    seconds: Annotated[float, typer.Option(help="Length of each run.")] = 12.0,
    deadline: Annotated[float, typer.Option(help="Deadline of every request in seconds.")] = 20.0,
    ray: Annotated[
        bool,
        typer.Option(
            "--ray/--no-ray",
            help="Whether Ray Serve restarts killed processes, or a supervisor does at once.",
        ),
    ] = True,
    folder: OutFolder = None,
) -> None:
    """Send SIGKILL to replicas and gateways under load; exit with 1 if a request is lost.

    Kills one of two replicas, both replicas, one of two gateways, and both gateways.
    """
    found = []
    deployed = _deployed_on_ray() if ray else _deployed_as_processes()
    with err.status("starting") as status, deployed as deployment:
        for name, kill in deployment.kills.items():
            status.update(f"killing {name}")
            wait_until_serving([deployment], 2)
            run = kill_under_load(
                deployment.address, name, kill, rate=rate, seconds=seconds, deadline_s=deadline
            )
            found.append(asyncio.run(run))
            err.print(f"{name}: {found[-1].answered} of {found[-1].requests} answered")
    out.print(_kills_table(found))
    write(folder, "kills-ray" if ray else "kills", {"runs": [run.to_dict() for run in found]})
    raise typer.Exit(int(any(run.answered < run.requests for run in found)))


@dataclass(frozen=True, slots=True)
class Deployment:
    """Two replicas behind two gateways on one port, and functions that kill some of them."""

    address: str
    metrics: str
    kills: dict[str, Callable[[], None]]


@contextmanager
def _deployed_as_processes() -> Iterator[Deployment]:
    with replicas_and_gateways(replicas=2, gateways=2) as (replicas, gateways):
        yield Deployment(
            gateways[0].address,
            gateways[0].metrics,
            {
                "one of two replicas": replicas[0].kill,
                "both replicas": lambda: _kill_processes(replicas),
                "one of two gateways": gateways[1].kill,
                "both gateways": lambda: _kill_processes(gateways),
            },
        )


@contextmanager
def _deployed_on_ray() -> Iterator[Deployment]:
    with ladderstitch_server("--ray", "--replicas", "2") as server:
        yield Deployment(
            server.address,
            server.metrics.removesuffix("/metrics"),
            {
                "one of two replicas": lambda: _kill_actors(server.pid, "replica", 1),
                "both replicas": lambda: _kill_actors(server.pid, "replica", 2),
                "one of two gateways": lambda: _kill_actors(server.pid, "gateway", 1),
                "both gateways": lambda: _kill_actors(server.pid, "gateway", 2),
            },
        )


def _kill_processes(processes: Sequence[SupervisedProcess]) -> None:
    for process in processes:
        process.kill()


def _kill_actors(server: int, deployment: str, count: int) -> None:
    """Send SIGKILL to `count` current processes of a Serve deployment below a server's process.

    Raises `StartError` if there are fewer.
    """
    found = serve_pids(server, deployment)
    if len(found) < count:
        raise StartError(f"{deployment}: expected {count} processes, got {len(found)}")
    for pid in found[:count]:
        os.kill(pid, signal.SIGKILL)


def serve_pids(server: int, deployment: str) -> list[int]:
    """Return the ids of a Serve deployment's processes among the descendants of a server."""
    title = f"ray::ServeReplica:ladderstitch:{deployment}"
    return [pid for pid in process_tree(server) if command_line(pid).startswith(title)]


def _kills_table(found: Sequence[FaultResult]) -> Table:
    table = Table("killed", "answered", "longest gap", "slowest", "p50", "p99")
    for run in found:
        table.add_row(
            run.killed,
            f"{run.answered} of {run.requests}",
            f"{run.longest_gap_s:.2f} s",
            f"{run.slowest_s:.2f} s",
            f"{run.p50_ms:.1f} ms",
            f"{run.p99_ms:.1f} ms",
        )
    return table


def malformed(
    requests: Annotated[int, typer.Option(min=1, help="Number of malformed requests.")] = 10_000,
    text: Annotated[
        bool,
        typer.Option(
            "--text", help="Send prompts to a tiny language model, with cancels and deadlines, too."
        ),
    ] = False,
    seed: Seed = 1,
    folder: OutFolder = None,
) -> None:
    """Send malformed requests of every kind; exit with 1 unless each gets the right status."""
    with tempfile.TemporaryDirectory() as name, progress_bar() as progress:
        flags = ("--model", str(write_tiny(Path(name) / "tiny"))) if text else ()
        with ladderstitch_server("--no-ray", *flags) as server:
            err.print(server.ready_line)
            found = asyncio.run(_send_malformed(server, requests, seed, progress, text=text))
    for line in found.wrong[:MAX_PRINTED]:
        err.print(line, highlight=False)
    out.print(
        f"{found.requests} malformed requests of {len(found.kinds)} kinds, "
        f"{len(found.wrong)} with a wrong status; {found.good_answers} good requests in between "
        f"answered; memory {found.memory_before_mb:.1f} -> {found.memory_after_mb:.1f} MiB"
    )
    write(folder, "malformed-text" if text else "malformed", found.to_dict())
    raise typer.Exit(1 if found.wrong else 0)


async def _send_malformed(
    server: StartedServer, requests: int, seed: int, progress: Progress, *, text: bool
) -> fuzz_runner.FuzzOutcome:
    task = progress.add_task("malformed", total=requests)
    pids = process_tree(server.pid)
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        model = await stub.GetModel(inference_pb2.GetModelRequest())
        cases = (TextCases if text else ImageCases)(model, channel, seed)
        return await fuzz_runner.run(cases, pids, requests, lambda: progress.advance(task))

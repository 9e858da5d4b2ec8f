"""Options that several commands share, and the server that an option starts or names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ladderstitch.cli.console import err
from ladderstitch_loadtest.load.targets import TargetKind
from ladderstitch_loadtest.servers.processes import StartedServer, ladderstitch_server

RunningServer = Annotated[str, typer.Argument(help="host:port of a running server.")]
Address = Annotated[
    str | None, typer.Option(help="host:port of a running server; unset: start one.")
]
Bundle = Annotated[
    Path,
    typer.Argument(help="Directory of a bundle, or name of a model.", show_default="fashion-mnist"),
]
OutFolder = Annotated[
    Path | None, typer.Option("--out", help="Folder for NAME.json; unset: print only.")
]
Ray = Annotated[
    bool, typer.Option("--ray/--no-ray", help="Whether the started server runs on Ray Serve.")
]
Seed = Annotated[int, typer.Option(help="Seed of all random choices.")]
Images = Annotated[int, typer.Option(min=1, help="Number of images in a request.")]
Rounds = Annotated[int, typer.Option(min=1, help="Interleaved runs of each contender.")]
Target = Annotated[
    TargetKind, typer.Option("--target", help="API of the server; `oip` for any OIP server.")
]
ModelName = Annotated[
    str, typer.Option("--model", help="Name of the model; required for `--target oip`.")
]
RunSeconds = Annotated[float, typer.Option(min=0.1, help="Length of the run in seconds.")]
Processes = Annotated[int, typer.Option(min=1, help="Processes that generate load.")]
MinAttainment = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Exit with 1 if attainment is below this share."),
]
Cpu = Annotated[
    int | None,
    typer.Option(help="CPU reserved for the generator; the started server gets the others."),
]
Policies = Annotated[
    list[str], typer.Option(help="Policy to compare, or `fixed N` for one variant; repeatable.")
]


@contextmanager
def running_server(address: str | None, ray: bool) -> Iterator[str]:
    """Yield `address`, or that of a server which runs during the `with` block."""
    if address is not None:
        yield address
        return
    with ladderstitch_server("--ray" if ray else "--no-ray") as server:
        err.print(server.ready_line)
        yield server.address


@contextmanager
def embedded_server(cpu: int | None) -> Iterator[StartedServer]:
    """Run a server of the embedded model on all CPUs but `cpu` during the `with` block."""
    before = os.sched_getaffinity(0)
    if cpu is not None:
        os.sched_setaffinity(0, before - {cpu} or before)
    try:
        with ladderstitch_server("--no-ray") as server:
            yield server
    finally:
        os.sched_setaffinity(0, before)

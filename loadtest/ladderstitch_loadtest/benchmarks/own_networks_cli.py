"""Command `own-networks`: networks of published architectures through the door for own networks."""

from __future__ import annotations

import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ladderstitch.bundles import HOME_VARIABLE
from ladderstitch.cli.console import err, out, user_errors
from ladderstitch.client import Client
from ladderstitch.errors import ConfigError
from ladderstitch_loadtest.benchmarks.own_networks import (
    NetworkResult,
    PairResult,
    failures,
    prepare,
    serve,
    to_dict,
)
from ladderstitch_loadtest.benchmarks.own_networks_zoo import ARCHITECTURES, add_packages
from ladderstitch_loadtest.cli_options import OutFolder
from ladderstitch_loadtest.servers.processes import ladderstitch_server
from ladderstitch_loadtest.servers.results_io import write

LIBRARIES = ("transformers", "timm", "torchvision", "onnx")
"""Libraries whose versions are stated with the figures."""


def own_networks(
    only: Annotated[
        list[str] | None, typer.Option(help="Architecture to check; repeatable (default: all).")
    ] = None,
    folder: OutFolder = None,
) -> None:
    """Export, cut, stitch and serve networks of 13 architectures; exit with 1 if one differs.

    The first run installs timm and torchvision into the cache. Weights are random.
    """
    started = time.monotonic()
    chosen = [a for a in ARCHITECTURES if not only or a.name in only]
    with user_errors(), err.status("starting") as status:
        if not chosen:
            known = ", ".join(a.name for a in ARCHITECTURES)
            raise ConfigError(f"only: expected some of {known}, got {only}")
        add_packages()
        networks: list[NetworkResult] = []
        pairs: list[PairResult] = []
        with tempfile.TemporaryDirectory() as work:
            home = Path(work) / "home"
            os.environ[HOME_VARIABLE] = str(home)
            with ladderstitch_server("--no-ray", "--max-batch-size", "4") as server:
                for architecture in chosen:
                    prepared = prepare(architecture, Path(work), home, status.update)
                    name = prepared.bundle.manifest.name
                    status.update(f"{architecture.name}: serve")
                    with Client(server.address) as client:
                        client.load_model(name)
                        serve(prepared, client)
                        client.unload_model(name)
                    networks += prepared.networks
                    pairs.append(prepared.pair)
    out.print(format_table(networks, pairs))
    lines = failures(networks, pairs)
    for line in lines:
        err.print(f"[bold red]{line}[/]")
    used = os.times()
    spent = {
        "libraries": {name: version(name) for name in LIBRARIES},
        "seconds": round(time.monotonic() - started, 1),
        "processor_seconds": round(sum(used[:4]), 1),
    }
    write(folder, "own-networks", spent | to_dict(networks, pairs))
    raise typer.Exit(int(bool(lines)))


def format_table(networks: list[NetworkResult], pairs: list[PairResult]) -> Table:
    """Return one row per network; the last of an architecture also has the paths."""
    columns = ("architecture", "network", "parameters", "output", "cuts", "blocks at cuts")
    table = Table(*columns, "served", "paths", "of paths")
    by_name = {pair.architecture: pair for pair in pairs}
    for number, found in enumerate(networks):
        following = networks[number + 1 : number + 2]
        last = not following or following[0].architecture != found.architecture
        pair = by_name[found.architecture]
        shapes = "; ".join(str(shape) for shape in found.outputs.values())
        paths = pair.reason or f"{pair.paths} of {pair.candidates}"
        table.add_row(
            found.architecture,
            found.network,
            f"{found.parameters:,}",
            shapes,
            str(found.cuts),
            f"{found.blocks_cut} of {found.blocks}",
            f"{found.served_difference:.1e}",
            paths if last else "",
            f"{pair.served_difference:.1e}" if last and pair.paths else "",
            end_section=last,
        )
    return table

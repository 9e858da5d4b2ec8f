"""Command `loads`: models loaded and unloaded hundreds of times, many of them given up."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ladderstitch.bundles import EMBEDDED, HOME_VARIABLE
from ladderstitch.cli.console import err, out, progress_bar
from ladderstitch_loadtest.cli_options import OutFolder, Seed
from ladderstitch_loadtest.faults.fuzz_cli import write_chat_model
from ladderstitch_loadtest.faults.loads import IMAGES, KEPT, TEXT, LoadCycles, LoadsResult
from ladderstitch_loadtest.servers.processes import StartedServer, ladderstitch_server
from ladderstitch_loadtest.servers.results_io import write

MAX_PRINTED = 20


def loads(
    cycles: Annotated[int, typer.Option(min=1, help="Loads that are measured.")] = 300,
    warm_up: Annotated[int, typer.Option(min=1, help="Loads before the first measurement.")] = 20,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Whether more memory fails the run.")
    ] = True,
    seed: Seed = 1,
    folder: OutFolder = None,
) -> None:
    """Load and unload models 300 times, and give up a third; exit with 1 if anything is left over.

    The server keeps one more model, which has to answer all the time.
    """
    with model_server() as server, progress_bar() as progress:
        task = progress.add_task("loads", total=cycles + warm_up)
        measured = LoadCycles(server, seed, lambda: progress.advance(task))
        found = asyncio.run(measured.run(cycles, warm_up))
    out.print(_table(found))
    for line in [*found.wrong, *found.lost][:MAX_PRINTED]:
        err.print(line, highlight=False, markup=False)
    failures = found.failures(memory=memory)
    for line in failures:
        err.print(f"[bold red]{line}[/]")
    write(folder, "loads", found.to_dict())
    raise typer.Exit(int(bool(failures)))


@contextmanager
def model_server() -> Iterator[StartedServer]:
    """Run a server of an image model that finds another image model and a language model."""
    before = os.environ.get(HOME_VARIABLE)
    with tempfile.TemporaryDirectory() as home:
        write_chat_model(Path(home) / TEXT)
        copy_images(Path(home) / IMAGES)
        os.environ[HOME_VARIABLE] = home
        try:
            with ladderstitch_server("--no-ray", "--model", KEPT) as server:
                err.print(server.ready_line)
                yield server
        finally:
            os.environ.pop(HOME_VARIABLE)
            if before is not None:
                os.environ[HOME_VARIABLE] = before


def copy_images(path: Path) -> None:
    """Write a copy of the embedded bundle whose model has another name."""
    shutil.copytree(EMBEDDED, path)
    manifest = path / "model.yaml"
    text = manifest.read_text().replace(f"\nname: {KEPT}\n", f"\nname: {IMAGES}\n", 1)
    manifest.write_text(text)


def _table(found: LoadsResult) -> Table:
    table = Table(
        "measured",
        "before",
        "after",
        title=f"{found.cycles} loads in {found.seconds:.0f} s",
        caption=f"{found.answers} good answers meanwhile, the slowest after "
        f"{found.slowest_ms:.0f} ms, {len(found.lost)} lost; "
        + ", ".join(f"{end} {count}" for end, count in sorted(found.ends.items())),
    )
    if found.before is not None and found.after is not None:
        old, new = found.before, found.after
        memory = (f"{state.held.memory_mb:.1f} MiB" for state in (old, new))
        table.add_row("memory", *memory)
        names = ("descriptors", "processes", "series")
        for name, *counts in zip(names, old.counts, new.counts, strict=True):
            table.add_row(name, *map(str, counts))
    return table

"""Command `restarts`: how soon a server answers again after it died or hung."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ladderstitch.bundles import EMBEDDED
from ladderstitch.cli.console import err, out, progress_bar
from ladderstitch_loadtest.cli_options import OutFolder
from ladderstitch_loadtest.faults.restarts import (
    RestartCase,
    RestartTimes,
    time_restarts,
)
from ladderstitch_loadtest.servers.results_io import write
from ladderstitch_loadtest.servers.tiny_language import write_tiny


def restarts(
    times: Annotated[int, typer.Option(min=1, help="Restarts after `kill -9` in each case.")] = 5,
    hangs: Annotated[
        int, typer.Option(min=0, help="Restarts after SIGSTOP in each case with a spare.")
    ] = 3,
    folder: OutFolder = None,
) -> None:
    """Kill or stop a server, and time its next good answer; exit with 1 if that takes too long.

    The limits depend on the time of `import torch`: 1.5 times plus 1 s with a spare process, and 4
    times without. A hang takes 11 s more to be noticed.
    """
    with tempfile.TemporaryDirectory() as name, progress_bar() as progress:
        cases = list_cases(write_tiny(Path(name) / "tiny"), times, hangs)
        task = progress.add_task("restarts", total=sum(cases.values()))
        found = [
            time_restarts(case, count, lambda: progress.advance(task))
            for case, count in cases.items()
        ]
        results = [each.to_dict() for each in found]
        out.print(_table(found))
        late = [f"{each.case.name}: over the limit" for each in found if not each.passed]
    for line in late:
        err.print(f"[bold red]{line}[/]")
    write(folder, "restarts", {"cases": results})
    raise typer.Exit(int(bool(late)))


def list_cases(language: Path, times: int, hangs: int) -> dict[RestartCase, int]:
    """Return the cases and the number of restarts of each."""
    cases = {}
    for bundle in (EMBEDDED, language):
        cases[RestartCase(bundle, True, signal.SIGKILL)] = times
        cases[RestartCase(bundle, False, signal.SIGKILL)] = times
        if hangs:
            cases[RestartCase(bundle, True, signal.SIGSTOP)] = hangs
    return cases


def _table(found: list[RestartTimes]) -> Table:
    table = Table("server", "next good answer", "limit", "import torch", "all")
    for each in found:
        row = each.to_dict()
        table.add_row(
            each.case.name,
            f"{each.median_s:.2f} s",
            f"{each.limit_s:.2f} s",
            f"{row['import_torch_s']:.2f} s",
            ", ".join(f"{seconds:.2f}" for seconds in each.seconds),
        )
    return table

"""`ladderstitch doctor`: what is in the way of a server here, and what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ladderstitch.bundles.registry import find_bundle
from ladderstitch.cli.console import out, user_errors
from ladderstitch.config import ServerConfig
from ladderstitch.replica.preflight import examine

COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


def doctor(
    config: Annotated[
        Path | None, typer.Option(help="What `serve --config` would get (default: none).")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="What `serve --model` would get (default: fashion-mnist).")
    ] = None,
) -> None:
    """Check what `serve` needs: versions, processors, GPU, memory, ports, bundle, certificates.

    Says what to do about what is wrong. Starts nothing; exits with 1 if anything failed.
    """
    with user_errors():
        bundle = find_bundle(model) if model is not None else None
        findings = list(examine(ServerConfig.load(config, bundle=bundle)))
    table = Table("", "state", "found", "what to do")
    for finding in findings:
        state = f"[{COLOURS[finding.state]}]{finding.state}[/]"
        table.add_row(finding.what, state, finding.found, finding.advice)
    out.print(table)
    raise typer.Exit(int(any(finding.state == "failed" for finding in findings)))


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Operate")(doctor)

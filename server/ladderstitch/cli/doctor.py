"""The command `doctor`, which checks this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from ladderstitch.cli.console import Json, out, user_errors
from ladderstitch.cli.output import print_fields, print_json

COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


def doctor(
    config: Annotated[
        Path | None, typer.Option(help="Configuration file, as for `serve --config`.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model, as for `serve --model`.", show_default="fashion-mnist"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that this machine can run a server.

    Checks versions, processors, GPU, memory, ports, bundle and certificates, and advises how to fix
    each problem. Starts nothing. Exits with 1 if a check failed.
    """
    from ladderstitch.bundles import find_bundle
    from ladderstitch.config import ServerConfig
    from ladderstitch.replica.preflight import run_checks

    with user_errors():
        given = {"bundle": find_bundle(model)} if model is not None else {}
        results = list(run_checks(ServerConfig.load(config, given).with_default_http()))
    records = [
        {
            "check": result.name,
            "state": result.state,
            "found": result.detail,
            "advice": result.advice or None,
        }
        for result in results
    ]
    if as_json:
        print_json({"checks": records})
    elif out.is_terminal:
        for record in records:
            state = Text(f"{record['state']:8}", style=COLOURS[str(record["state"])])
            out.print(Text.assemble(state, f"{record['check']}: {record['found']}"))
            if record["advice"]:
                out.print(f"        {record['advice']}", markup=False, highlight=False)
    else:
        print_fields(records)
    raise typer.Exit(int(any(result.state == "failed" for result in results)))

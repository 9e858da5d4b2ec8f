"""`ladderstitch load`, `unload`, `drain`, `health`: a running server, from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ladderstitch.bundles import find_bundle
from ladderstitch.cli.console import connect, err, out, user_errors
from ladderstitch.cli.predict import DEFAULT_ADDRESS, Address, explain, parse_duration, reported
from ladderstitch.client import RequestFailed

SLACK_S = 5.0
"""Beyond what was asked for, before the call is given up."""


def drain(
    context: typer.Context,
    announce: Annotated[
        str, typer.Option(help="So long, say NOT_SERVING but accept: for load balancers to notice.")
    ] = "0s",
    timeout: Annotated[
        str, typer.Option(help="Give up so long after that; the server's `drain_s` counts, too.")
    ] = "60s",
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Take a replica out of service: health first, then no new requests, then wait for the rest.

    For a Kubernetes preStop hook, whose SIGTERM reaches Ray and not the replica. Needs a token with
    the scope `admin` where the server asks for tokens, and the admin port where it has one. Exits
    with 0 when every accepted request has ended, with 1 otherwise.
    """
    with user_errors():
        announce_s, timeout_s = parse_duration(announce), parse_duration(timeout)
        with connect(context, address, timeout_s=announce_s + timeout_s + SLACK_S) as client:
            try:
                finished = client.drain(announce_s)
            except RequestFailed as error:
                err.print(explain(error, address), highlight=False)
                raise typer.Exit(1) from None
    if not finished:
        err.print("some requests did not end within the server's drain_s")
        raise typer.Exit(1)
    err.print("drained")


def health(
    context: typer.Context,
    address: Address = DEFAULT_ADDRESS,
    service: Annotated[
        str, typer.Option(help="Name of a service or model; default: the whole replica.")
    ] = "",
) -> None:
    """Ask whether a server answers requests: prints its state, exits with 0 if it is SERVING."""
    with user_errors(), connect(context, address, timeout_s=5) as client:
        try:
            state = client.health(service)
        except RequestFailed as error:
            err.print(explain(error, address), highlight=False)
            raise typer.Exit(1) from None
    out.print(state)
    raise typer.Exit(int(state != "SERVING"))


def load(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Name of a model that the server has fetched.")],
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Serve another model on a running server, or read a loaded one anew; nothing is lost."""
    with (
        reported(address),
        err.status(f"loading and warming {model} ..."),
        connect(context, address) as client,
    ):
        name = client.load_model(model)
    out.print(f"{name} answers")


def unload(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Take a model away from a running server, once its accepted requests have ended."""
    with reported(address), connect(context, address, timeout_s=600) as client:
        client.unload_model(model, timeout_s=600)
    out.print(f"{model} is gone")


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
    from ladderstitch.config import ServerConfig
    from ladderstitch.replica.preflight import examine

    with user_errors():
        given = {"bundle": find_bundle(model)} if model is not None else {}
        findings = list(examine(ServerConfig.load(config, given)))
    table = Table("", "state", "found", "what to do")
    for finding in findings:
        state = f"[{COLOURS[finding.state]}]{finding.state}[/]"
        table.add_row(finding.what, state, finding.found, finding.advice)
    out.print(table)
    raise typer.Exit(int(any(finding.state == "failed" for finding in findings)))


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Operate")(load)
    app.command(rich_help_panel="Operate")(unload)
    app.command(rich_help_panel="Operate")(drain)
    app.command(rich_help_panel="Operate")(health)
    app.command(rich_help_panel="Operate")(doctor)

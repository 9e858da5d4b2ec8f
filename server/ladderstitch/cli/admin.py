"""The commands `load`, `unload`, `drain`, `health` of a running server, and `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ladderstitch.bundles import find_bundle
from ladderstitch.cli.console import (
    Address,
    connect,
    err,
    exit_on_failure,
    out,
    parse_duration,
    user_errors,
)
from ladderstitch.client.calls import DEFAULT_ADDRESS

HEALTH_TIMEOUT_S = 5.0
UNLOAD_TIMEOUT_S = 600.0
MARGIN_S = 5.0
"""Seconds added to the deadline of a `Drain` call, so that the server reports a timeout itself."""

COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


def drain(
    context: typer.Context,
    announce: Annotated[
        str,
        typer.Option(
            help="How long to report NOT_SERVING while still accepting requests, so that load "
            "balancers react."
        ),
    ] = "0s",
    timeout: Annotated[
        str,
        typer.Option(
            help="Maximum wait for in-flight requests (the server's `drain_s` also applies)."
        ),
    ] = "60s",
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Take a replica out of service, and wait until its accepted requests have ended.

    Intended for a Kubernetes preStop hook, because SIGTERM reaches Ray and not the replica. Health
    changes first; then new requests are rejected. If the server requires tokens, use one with the
    scope `admin`; if it has an admin port, use that. Exits with 0 if every accepted request has
    ended, with 1 otherwise.
    """
    with exit_on_failure(address):
        announce_s = parse_duration(announce, "announce")
        timeout_s = announce_s + parse_duration(timeout, "timeout") + MARGIN_S
        with connect(context, address, timeout_s) as client:
            finished = client.drain(announce_s)
    if not finished:
        err.print("some requests did not end within the server's drain_s")
        raise typer.Exit(1)
    err.print("drained")


def health(
    context: typer.Context,
    address: Address = DEFAULT_ADDRESS,
    service: Annotated[
        str, typer.Option(help="Name of a service or model (default: the whole replica).")
    ] = "",
) -> None:
    """Print whether a server accepts requests: exits with 0 if it is SERVING, with 1 otherwise."""
    with exit_on_failure(address), connect(context, address, HEALTH_TIMEOUT_S) as client:
        state = client.health(service)
    out.print(state)
    raise typer.Exit(int(state != "SERVING"))


def load(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Name of a model that the server has fetched.")],
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Load another model on a running server, or a new version of a loaded one."""
    with (
        exit_on_failure(address),
        err.status(f"loading and warming {model} ..."),
        connect(context, address) as client,
    ):
        name = client.load_model(model)
    out.print(f"loaded {name}")


def unload(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Unload a model from a running server once its accepted requests have ended."""
    with exit_on_failure(address), connect(context, address, UNLOAD_TIMEOUT_S) as client:
        client.unload_model(model)
    out.print(f"unloaded {model}")


def doctor(
    config: Annotated[
        Path | None, typer.Option(help="Configuration file, as for `serve --config`.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model, as for `serve --model`.", show_default="fashion-mnist"),
    ] = None,
) -> None:
    """Check that this machine can run a server.

    Checks versions, processors, GPU, memory, ports, bundle and certificates, and advises how to fix
    each problem. Starts nothing. Exits with 1 if a check failed.
    """
    from ladderstitch.config import ServerConfig
    from ladderstitch.replica.preflight import run_checks

    with user_errors():
        given = {"bundle": find_bundle(model)} if model is not None else {}
        results = list(run_checks(ServerConfig.load(config, given)))
    table = Table("check", "state", "found", "advice")
    for result in results:
        state = f"[{COLOURS[result.state]}]{result.state}[/]"
        table.add_row(result.name, state, result.detail, result.advice)
    out.print(table)
    raise typer.Exit(int(any(result.state == "failed" for result in results)))


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command(rich_help_panel="Operate")(load)
    app.command(rich_help_panel="Operate")(unload)
    app.command(rich_help_panel="Operate")(drain)
    app.command(rich_help_panel="Operate")(health)
    app.command(rich_help_panel="Operate")(doctor)

"""The commands `load`, `unload`, `drain`, `health` of a running server."""

from __future__ import annotations

from typing import Annotated

import typer

from ladderstitch.addresses import DEFAULT_ADDRESS
from ladderstitch.cli.console import (
    Address,
    Json,
    connect,
    err,
    exit_on_failure,
    out,
    parse_duration,
)
from ladderstitch.cli.output import print_json

HEALTH_TIMEOUT_S = 5.0
UNLOAD_TIMEOUT_S = 600.0
MARGIN_S = 5.0
"""Seconds added to the deadline of a `Drain` call, so that the server reports a timeout itself."""


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
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Take a replica out of service; wait for its requests.

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
    if as_json:
        print_json({"finished": finished})
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
    as_json: Json = False,
) -> None:
    """Print whether a server accepts requests.

    Exits with 0 if it is SERVING, with 1 otherwise.
    """
    with exit_on_failure(address), connect(context, address, HEALTH_TIMEOUT_S) as client:
        state = client.health(service)
    if as_json:
        print_json({"service": service, "state": state})
    else:
        out.print(state)
    raise typer.Exit(int(state != "SERVING"))


def load(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Name of a model that the server has fetched.")],
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Load a model on a running server, or a new version."""
    with (
        exit_on_failure(address),
        err.status(f"loading and warming {model} ..."),
        connect(context, address) as client,
    ):
        name = client.load_model(model)
    if as_json:
        print_json({"loaded": name})
    else:
        out.print(f"loaded {name}")


def unload(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Unload a model once its accepted requests have ended."""
    with exit_on_failure(address), connect(context, address, UNLOAD_TIMEOUT_S) as client:
        client.unload_model(model)
    if as_json:
        print_json({"unloaded": model})
    else:
        out.print(f"unloaded {model}")

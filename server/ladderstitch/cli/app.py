"""The command line's table of contents; each group of commands has a module of its own."""

from __future__ import annotations

import typer

import ladderstitch
from ladderstitch.cli import (
    access,
    doctoring,
    generating,
    making,
    measuring,
    operating,
    overlapping,
    predicting,
    serving,
)

app = typer.Typer(
    name="ladderstitch",
    help="Serve elastic models under latency budgets: one set of weights holds many networks, and "
    "each request is answered by the best one that its budget allows.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(ladderstitch.__version__)
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
    ca: access.Ca = None,
    tls: access.Tls = False,
    certificate: access.Certificate = None,
    key: access.Key = None,
    token_file: access.TokenFile = None,
    server_name: access.ServerName = None,
) -> None:
    context.obj = access.Options(ca, tls, certificate, key, token_file, server_name)


serving.register(app)
operating.register(app)
doctoring.register(app)
predicting.register(app)
generating.register(app)
making.register(app)
measuring.register(app)
overlapping.register(app)

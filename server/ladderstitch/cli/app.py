"""The command line's table of contents; each group of commands has a module of its own."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

import ladderstitch
from ladderstitch.cli import console

MODULES = (
    "serve",
    "gateway",
    "admin",
    "predict",
    "generate",
    "make",
    "measure",
)
"""In the order of the help page; each puts its commands into a Typer by `register`."""
LIGHT = ("admin", "predict", "gateway")
"""Without torch: orchestrators call some of their commands every few seconds."""


@cache
def commands_of(module: str) -> dict[str, Any]:
    """A module's commands by name."""
    part = typer.Typer()
    import_module(f"ladderstitch.cli.{module}").register(part)
    part.callback()(lambda: None)  # a group even of one command
    commands: dict[str, Any] = dict(typer.main.get_group(part).commands)
    return commands


class Commands(TyperGroup):
    """Imports modules only until the command is found, the light ones first."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for module in MODULES for name in commands_of(module)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        for module in sorted(MODULES, key=lambda module: module not in LIGHT):
            if cmd_name in commands_of(module):
                return commands_of(module)[cmd_name]
        return None


app = typer.Typer(
    name="ladderstitch",
    cls=Commands,
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
    ca: console.Ca = None,
    tls: console.Tls = False,
    certificate: console.Certificate = None,
    key: console.Key = None,
    token_file: console.TokenFile = None,
    server_name: console.ServerName = None,
) -> None:
    context.obj = console.Options(ca, tls, certificate, key, token_file, server_name)

"""The command line; each group of commands has its own module, imported when it is needed."""

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
    "elastic",
    "own_models",
    "measure",
)
"""The modules in the order of the help page; `register` of each adds its commands to a Typer."""
LIGHT = ("admin", "predict", "generate", "gateway")
"""Modules that do not import torch: orchestrators run some of their commands every few seconds."""


@cache
def commands_of(module: str) -> dict[str, Any]:
    """Return the commands of a module by name."""
    part = typer.Typer(rich_markup_mode="markdown")
    import_module(f"ladderstitch.cli.{module}").register(part)
    part.callback()(lambda: None)  # a group even of one command
    commands: dict[str, Any] = dict(typer.main.get_group(part).commands)
    return commands


class Commands(TyperGroup):
    """A group that imports modules until it finds the command, the light modules first."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands, in the order of the help page."""
        return [name for module in MODULES for name in commands_of(module)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, or None if there is none of that name."""
        for module in sorted(MODULES, key=lambda module: module not in LIGHT):
            if cmd_name in commands_of(module):
                return commands_of(module)[cmd_name]
        return None


app = typer.Typer(
    name="ladderstitch",
    cls=Commands,
    rich_markup_mode="markdown",
    help="Serve elastic models under latency budgets: one set of weights holds many networks, and "
    "the server answers each request with the most accurate one that meets its budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(ladderstitch.__version__)
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
    ca: console.Ca = None,
    tls: console.Tls = False,
    certificate: console.Certificate = None,
    key: console.Key = None,
    token_file: console.TokenFile = None,
    server_name: console.ServerName = None,
) -> None:
    """Store the connection options for the command that follows."""
    context.obj = console.ConnectionOptions(ca, tls, certificate, key, token_file, server_name)

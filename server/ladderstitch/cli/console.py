"""What every command shares: the consoles, progress bars, and how an error looks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ladderstitch.client import Client, Credentials
from ladderstitch.errors import ConfigError, UserError

out = Console()
err = Console(stderr=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """Print a `UserError` as one message and exit with 2, without a stack trace."""
    try:
        yield
    except UserError as error:
        err.print(f"[bold red]error:[/] {error}", highlight=False)
        raise typer.Exit(2) from None


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
    )


PANEL = "Reaching a server (before the command)"

Ca = Annotated[
    Path | None,
    typer.Option(
        envvar="LADDERSTITCH_CA",
        help="PEM of the authority that signed the server's certificate.",
        rich_help_panel=PANEL,
    ),
]
Tls = Annotated[
    bool,
    typer.Option(
        "--tls",
        envvar="LADDERSTITCH_TLS",
        help="TLS with the system's authorities.",
        rich_help_panel=PANEL,
    ),
]
Certificate = Annotated[
    Path | None,
    typer.Option(envvar="LADDERSTITCH_CERTIFICATE", help="For mutual TLS.", rich_help_panel=PANEL),
]
Key = Annotated[
    Path | None,
    typer.Option(envvar="LADDERSTITCH_KEY", help="The certificate's key.", rich_help_panel=PANEL),
]
ServerName = Annotated[
    str | None,
    typer.Option(
        envvar="LADDERSTITCH_SERVER_NAME",
        help="Name in the server's certificate, if not that of the address.",
        rich_help_panel=PANEL,
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        envvar="LADDERSTITCH_TOKEN_FILE",
        help="File that holds the bearer token.",
        rich_help_panel=PANEL,
    ),
]


@dataclass(frozen=True, slots=True)
class Options:
    """What was said before the command."""

    ca: Path | None
    tls: bool
    certificate: Path | None
    key: Path | None
    token_file: Path | None
    server_name: str | None

    def access(self) -> Credentials:
        token = self.token_file.read_text().strip() if self.token_file else None
        return Credentials(self.ca, self.certificate, self.key, token, self.tls, self.server_name)


def connect(context: typer.Context, address: str, timeout_s: float = 30.0) -> Client:
    """A client with the options of the command that runs; raises `ConfigError` for wrong ones."""
    options = context.find_object(Options)
    assert options is not None, "set before every command"
    try:
        # whoever sits at a terminal wants to know at once
        return Client(address, timeout_s, options.access(), retries=None)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error

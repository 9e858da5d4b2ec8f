"""What all commands share: consoles, progress bars, errors, and the connection to a server."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ladderstitch.client import Client, Credentials, RequestFailed
from ladderstitch.client.calls import DEFAULT_TIMEOUT_S
from ladderstitch.errors import ConfigError, UserError

out = Console()
err = Console(stderr=True)

UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
PANEL = "Connection to a server (before the command)"

Address = Annotated[str, typer.Option(help="HOST:PORT of the server's gRPC endpoint.")]
ModelName = Annotated[str, typer.Option(help="Name of the model (default: the server's only one).")]
Variant = Annotated[int | None, typer.Option(help="Id of the variant to run, whatever the budget.")]
MinQuality = Annotated[
    float | None,
    typer.Option(help="Minimum quality, 0 to 1; fail if no variant has it."),
]
Ca = Annotated[
    Path | None,
    typer.Option(
        envvar="LADDERSTITCH_CA",
        help="PEM file of the authority that signed the server's certificate.",
        rich_help_panel=PANEL,
    ),
]
Tls = Annotated[
    bool,
    typer.Option(
        "--tls",
        envvar="LADDERSTITCH_TLS",
        help="Use TLS with the system's authorities.",
        rich_help_panel=PANEL,
    ),
]
Certificate = Annotated[
    Path | None,
    typer.Option(
        envvar="LADDERSTITCH_CERTIFICATE",
        help="PEM file of the client's certificate, for mutual TLS.",
        rich_help_panel=PANEL,
    ),
]
Key = Annotated[
    Path | None,
    typer.Option(
        envvar="LADDERSTITCH_KEY",
        help="PEM file of the certificate's key.",
        rich_help_panel=PANEL,
    ),
]
ServerName = Annotated[
    str | None,
    typer.Option(
        envvar="LADDERSTITCH_SERVER_NAME",
        help="Name in the server's certificate, if it is not that of the address.",
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
class ConnectionOptions:
    """The options given before the command: how to connect to a server."""

    ca: Path | None
    tls: bool
    certificate: Path | None
    key: Path | None
    token_file: Path | None
    server_name: str | None

    def credentials(self) -> Credentials:
        """Return the client's credentials; raises `OSError` if the token cannot be read."""
        token = self.token_file.read_text().strip() if self.token_file else None
        return Credentials(self.ca, self.certificate, self.key, token, self.tls, self.server_name)


def connect(context: typer.Context, address: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> Client:
    """Return a client with the options of the running command.

    The client does not retry, so that users see a failure immediately. Raises `ConfigError` for
    options that cannot be used.
    """
    options = context.find_object(ConnectionOptions)
    assert options is not None, "set before every command"
    try:
        return Client(address, timeout_s, options.credentials(), retry_policy=None)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error


@contextmanager
def user_errors() -> Iterator[None]:
    """Print a `UserError` as one message and exit with 2, without a stack trace."""
    try:
        yield
    except UserError as error:
        err.print(f"[bold red]error:[/] {error}", highlight=False)
        raise typer.Exit(2) from None


@contextmanager
def exit_on_failure(address: str) -> Iterator[None]:
    """Print a failed call as one message and exit with 1; handle a `UserError` as `user_errors`."""
    try:
        with user_errors():
            yield
    except RequestFailed as error:
        err.print(format_failure(error, address), highlight=False)
        raise typer.Exit(1) from None


def format_failure(error: RequestFailed, address: str) -> str:
    """Return a message that states the failure and what to do next."""
    if error.code.name == "UNAVAILABLE" and not error.reason:
        return f"[red]no server at {address}[/]; start one with `ladderstitch serve`"
    advice = ""
    if "min_feasible_us" in error.metadata:
        advice = f"; the smallest budget is {int(error.metadata['min_feasible_us']) / 1e3:.2f} ms"
    if error.retry_after_s is not None:
        advice = f"; try again in {1e3 * error.retry_after_s:.0f} ms"
    message = error.message.removeprefix(f"{error.code.name}: ")
    return f"[red]{error.code.name}[/] {message}{advice}"


def progress_bar() -> Progress:
    """Return a progress bar on standard error."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
    )


def plain_table(*columns: str, text: Collection[str]) -> Table:
    """Return a table without borders, which fits a terminal of 80 columns.

    Columns in `text` may wrap. The others hold numbers, which are aligned and never wrap.
    """
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for name in columns:
        if name in text:
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    return table


def parse_duration(text: str, option: str = "budget") -> float:
    """Return the seconds of "800us", "5ms", "0.5s" or a plain number of seconds.

    Raises `ConfigError` that names `option`.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s)?", text.strip())
    if not match:
        raise ConfigError(f"{option}: expected e.g. 800us, 5ms or 0.5s, got {text!r}")
    return float(match[1]) * UNITS[match[2] or "s"]

"""What all commands share: consoles, progress bars, errors, and the connection to a server."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ladderstitch.errors import ConfigError, UserError

if TYPE_CHECKING:  # help and usage errors appear without grpc
    from rich.progress import Progress

    from ladderstitch.client import Client, Credentials, RequestFailed

out = Console()
err = Console(stderr=True)

UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
MISSED = 3
"""Exit code of `--require-met` if a budget was missed."""
PANEL = "Connection to a server (before the command)"

Address = Annotated[str, typer.Option(help="HOST:PORT of the server's gRPC endpoint.")]
ModelName = Annotated[str, typer.Option(help="Name of the model (default: the server's only one).")]
Variant = Annotated[int | None, typer.Option(help="Id of the variant to run, whatever the budget.")]
Priority = Annotated[
    int,
    typer.Option(min=0, max=255, help="Priority, 1 (highest) to 255 (lowest); 0: normal (128)."),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document; docs/cli.md has its fields."),
]
RequireMet = Annotated[
    bool, typer.Option("--require-met", help="Exit with 3 if a budget was missed.")
]
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
        help="File that holds one bearer token and nothing else.",
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
        """Return the client's credentials.

        Raises `OSError` or `ValueError` if the token file cannot be read or holds no token.
        """
        from ladderstitch.client import Credentials
        from ladderstitch.client.channel import read_token

        token = read_token(self.token_file) if self.token_file else None
        return Credentials(self.ca, self.certificate, self.key, token, self.tls, self.server_name)


def connect(context: typer.Context, address: str, timeout_s: float | None = None) -> Client:
    """Return a client with the options of the running command; unset: its default deadline.

    The client does not retry, so that users see a failure immediately. Raises `ConfigError` for
    options that cannot be used.
    """
    from ladderstitch.client import Client
    from ladderstitch.client.calls import DEFAULT_TIMEOUT_S

    options = context.find_object(ConnectionOptions)
    assert options is not None, "set before every command"
    try:
        credentials = options.credentials()
        return Client(address, timeout_s or DEFAULT_TIMEOUT_S, credentials, retry_policy=None)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error


@contextmanager
def user_errors() -> Iterator[None]:
    """Print a `UserError` as one message and exit with 2, without a stack trace."""
    try:
        yield
    except UserError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from None


@contextmanager
def exit_on_failure(address: str) -> Iterator[None]:
    """Print a failed call as one message and exit with 1; handle a `UserError` as `user_errors`."""
    from ladderstitch.client import RequestFailed

    try:
        with user_errors():
            yield
    except RequestFailed as error:
        err.print(format_failure(error, address), highlight=False)
        raise typer.Exit(1) from None


def format_failure(error: RequestFailed, address: str) -> str:
    """Return a message, in Rich's markup, that states the failure and what to do next."""
    if error.code.name == "UNAVAILABLE" and not error.reason:
        return f"[red]no server at {address}[/]; start one with `ladderstitch serve`"
    advice = ""
    if "min_feasible_us" in error.metadata:
        advice = f"; try a budget of {int(error.metadata['min_feasible_us']) / 1e3:.2f} ms"
    if error.retry_after_s is not None:
        advice = f"; try again in {1e3 * error.retry_after_s:.0f} ms"
    message = error.message.removeprefix(f"{error.code.name}: ")
    return f"[red]{error.code.name}[/] {escape(message)}{advice}"


def progress_bar() -> Progress:
    """Return a progress bar on standard error."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
    )


def plain_table(
    columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, text: Collection[str]
) -> Table:
    """Return a table without borders whose cells never wrap.

    Cells of the columns in `text` are cut off with an ellipsis where the table would be wider than
    the terminal. The other columns hold numbers, which are aligned and always complete. A cell that
    is a `str` is printed as it is, without markup.
    """
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for name in columns:
        if name in text:
            table.add_column(name, overflow="ellipsis")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [Text(cell) if isinstance(cell, str) else cell for cell in row]
        for name, cell in zip(columns, cells, strict=True):
            cell.no_wrap = name in text or None
        table.add_row(*cells)
    return table


def parse_duration(text: str, option: str = "budget") -> float:
    """Return the seconds of a duration such as "800us", "5ms", "0.5s" or "0".

    Raises `ConfigError`, which names `option`, for another text; only zero needs no unit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s)?", text.strip())
    if match and match[2]:
        return float(match[1]) * UNITS[match[2]]
    if match and float(match[1]) == 0:
        return 0.0
    raise ConfigError(
        f"{option}: expected a number with a unit (us, ms or s) such as 800us, 5ms or 0.5s, got "
        f"{text!r}"
    )

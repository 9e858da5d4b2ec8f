"""The command `rank`, which runs one rank of a model for a server elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ladderstitch.cli.console import user_errors
from ladderstitch.errors import ConfigError

if TYPE_CHECKING:
    pass  # imported late: the help page needs none


def rank(
    address: Annotated[str, typer.Argument(help="HOST:PORT, the server's `rank_address`.")],
    secret_file: Annotated[
        Path, typer.Option(help="File with the secret; the server's `rank_secret_file`.")
    ],
) -> None:
    """Run one rank for a server on another machine.

    A rank holds its share of a tensor-parallel model. The command exits when the server
    disconnects.
    """
    from ladderstitch.text.engine.rank import run

    with user_errors():
        try:
            run(address, secret_file.read_text().strip())
        except OSError as error:
            raise ConfigError(f"rank: {error}") from error

"""Command `language-peers`: ladderstitch compared with llama.cpp on the same file."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from ladderstitch.cli.console import err, out, user_errors
from ladderstitch.errors import ConfigError
from ladderstitch_loadtest.benchmarks.language_peers import (
    LADDERSTITCH,
    OTHER,
    LanguageComparison,
    compare,
)
from ladderstitch_loadtest.cli_options import OutFolder
from ladderstitch_loadtest.servers.results_io import write


def language_peers(
    model: Annotated[str, typer.Option(help="Fetched model whose GGUF file both serve.")] = (
        "smollm2"
    ),
    path: Annotated[str, typer.Option(help="Path of the model that is compared.")] = (
        "standard-int4"
    ),
    threads: Annotated[str, typer.Option(help="Numbers of threads, one after another.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    folder: OutFolder = None,
) -> None:
    """Compare with llama.cpp's server: one stream, a long prompt, and eight streams.

    The first run installs llama.cpp (15 MB) into the cache. Both servers bind to 127.0.0.1 and get
    the same prompts over OpenAI's API.
    """
    with user_errors(), err.status("starting") as status:
        found = compare(model, path, _parse_counts(threads), rounds, status.update)
    out.print(_format_table(found))
    write(folder, "language-peers", found.to_dict())


def _parse_counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"threads: expected numbers such as 1,2, got {text!r}") from None


def _format_table(found: LanguageComparison) -> Table:
    table = Table(
        "threads",
        "",
        OTHER,
        LADDERSTITCH,
        "ratio",
        title=f"{found.file}, path {found.path}: medians of {found.rounds} rounds",
    )
    for figure in found.figures:
        values = (f"{figure.values[name]:.1f}" for name in (OTHER, LADDERSTITCH))
        table.add_row(str(figure.threads), figure.quantity, *values, f"{figure.ratio:.2f}")
    return table

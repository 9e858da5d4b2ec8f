"""Command `language-peers`: ladderstitch compared with other servers on the same weights."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ladderstitch.cli.console import err, out, user_errors
from ladderstitch.errors import ConfigError
from ladderstitch_loadtest.benchmarks.completions import ANSWER_TOKENS
from ladderstitch_loadtest.benchmarks.language_contenders import (
    LADDERSTITCH,
    find_precisions,
    make_contenders,
)
from ladderstitch_loadtest.benchmarks.language_peers import (
    LanguageComparison,
    LanguageFigure,
    compare,
)
from ladderstitch_loadtest.cli_options import OutFolder
from ladderstitch_loadtest.servers.results_io import write

PRINTED = {
    "one stream, tokens/s": "1 stream, tokens/s",
    "first token of a long prompt, ms": "first token, ms",
}
"""Short names of quantities."""


def language_peers(
    model: Annotated[str, typer.Option(help="Fetched model whose weights all serve.")] = "smollm2",
    path: Annotated[str, typer.Option(help="Path that is compared with llama.cpp.")] = (
        "standard-int4"
    ),
    peers: Annotated[
        str, typer.Option(help="Peers to include: llama.cpp, transformers, vllm; unset: all.")
    ] = "",
    threads: Annotated[str, typer.Option(help="Numbers of threads, one after another.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    tokens: Annotated[
        int, typer.Option(min=2, help="Maximum number of tokens of an answer.")
    ] = ANSWER_TOKENS,
    folder: OutFolder = None,
) -> None:
    """Compare with llama.cpp, `transformers` and vLLM: one stream, a long prompt, eight streams.

    llama.cpp reads the GGUF file of the model; the others read the unquantised weights in float32,
    and in bfloat16 if the processor multiplies it. The first run creates an environment for each
    of them in the cache (0.1, 1.2 and 3.4 GB). All servers bind to 127.0.0.1 and get the same
    prompts over OpenAI's API. Those that cannot be installed or started are listed as not
    available, with the reason.
    """
    with user_errors(), err.status("starting") as status:
        names = [name.strip() for name in peers.split(",")] if peers else None
        contenders = make_contenders(path, find_precisions(), names)
        counts = _parse_counts(threads)
        found = compare(model, contenders, counts, rounds, tokens, status.update)
    out.print(format_table(found))
    for name, reason in found.unavailable.items():
        out.print(f"{name}: {reason}", markup=False)
    write(folder, "language-peers", found.to_dict())


def _parse_counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"threads: expected numbers such as 1,2, got {text!r}") from None


def format_table(found: LanguageComparison) -> Table:
    """Return the figures as a table, with ladderstitch's ratio next to each other value.

    Each number of threads and precision has a row of its own above its quantities.
    """
    names = [LADDERSTITCH, *found.packages]
    title = f"{found.model}: medians of {found.rounds} rounds (ladderstitch / other)"
    table = Table(
        "threads, precision",
        *names,
        title=title,
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    previous = None
    for figure in found.figures:
        part = f"{figure.threads}, {figure.precision}"
        if part != previous:
            table.add_row(part, style="bold")
        previous = part
        cells = [_format_cell(figure, name) for name in names]
        table.add_row(PRINTED.get(figure.quantity, figure.quantity), *cells)
    return table


def _format_cell(figure: LanguageFigure, name: str) -> str:
    if name not in figure.values:
        return "-"
    ratio = f" ({figure.ratios[name]:.2f})" if name in figure.ratios else ""
    return f"{figure.values[name]:.1f}{ratio}"

"""Command `peers`: ladderstitch compared with NVIDIA Triton and a bare gRPC echo."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import typer
from rich.table import Table

from ladderstitch.cli.console import err, out, user_errors
from ladderstitch.errors import ConfigError
from ladderstitch_loadtest.benchmarks.peers import Figure, PeerComparison, compare
from ladderstitch_loadtest.cli_options import OutFolder
from ladderstitch_loadtest.load.closed_loop import find_generator
from ladderstitch_loadtest.servers.results_io import write

PRINTED = {
    "mean_ms": "mean latency, ms",
    "p50_ms": "p50 latency, ms",
    "answers_per_s": "answers/s",
    "compute_ms": "compute, ms",
    "beyond_compute_ms": "total - compute, ms",
}
"""Names of the quantities; the last two are as each server reports them."""
ONE_CALLER, MANY_CALLERS = ("mean_ms", "p50_ms"), ("answers_per_s",)
"""Quantities that are printed for one caller only, and for several callers only."""


def peers(
    variants: Annotated[
        str, typer.Option(help="Variants of the embedded model, pinned one after another.")
    ] = "0,5,7",
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of each run.")] = 3.0,
    generator: Annotated[
        Literal["auto", "h2load", "grpc"],
        typer.Option(help="Load generator; auto: h2load if it is installed."),
    ] = "auto",
    folder: OutFolder = None,
) -> None:
    """Compare with NVIDIA Triton on the same network, and with a bare gRPC echo.

    The first run installs Triton (55 MB) into the cache. All servers bind to 127.0.0.1 and get the
    same requests of one image, at 1, 8 and 32 callers.
    """
    chosen = find_generator() if generator == "auto" else generator
    with user_errors(), err.status("starting") as status:
        found = compare(_parse_ids(variants), rounds, seconds, chosen, status.update)
    out.print(format_table(found))
    out.print(
        f"largest difference of two logits {found.largest_difference:.1e}; generator "
        f"{found.generator}; load average before the start {found.load_before:g}"
    )
    write(folder, "peers", found.to_dict())


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"variants: expected ids such as 0,5,7, got {text!r}") from None


def format_table(found: PeerComparison) -> Table:
    """Return the figures as a table: latency for one caller, answers/s for several."""
    table = Table(
        "",
        "echo",
        "Triton",
        "ladderstitch",
        "/Triton",
        "/echo",
        title=f"variant, callers: medians of {found.rounds} rounds of {found.seconds:g} s",
    )
    for figure in found.figures:
        if figure.quantity not in (MANY_CALLERS if figure.callers == 1 else ONE_CALLER):
            table.add_row(*_format_row(figure), end_section=figure.quantity == "beyond_compute_ms")
    return table


def _format_row(figure: Figure) -> list[str]:
    digits = 0 if figure.quantity == "answers_per_s" else 2
    values = [figure.values[name] for name in ("echo", "triton", "ladderstitch")]
    return [
        f"{figure.variant}, {figure.callers}: {PRINTED[figure.quantity]}",
        *(_format(value, digits) for value in values),
        *(_format(ratio, 2) for ratio in (figure.over_triton, figure.over_echo)),
    ]


def _format(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"

"""The command `ladderstitch-loadtest overlap`: residual schemes on a link, as table and plot."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from ladderstitch.cli.console import err, out, parse_duration, progress_bar, user_errors
from ladderstitch.errors import ConfigError, RequestError
from ladderstitch.runtime.device import device_name, versions
from ladderstitch_loadtest.benchmarks.overlap import (
    SCHEMES,
    ModelShape,
    OverlapPlan,
    OverlapRow,
    measure,
)


def overlap(
    link: Annotated[
        str,
        typer.Option(help="Kind of link: shared_memory (emulated latency) or tcp (real delay)."),
    ] = "shared_memory",
    latency: Annotated[
        str, typer.Option(help="Comma-separated one-way latencies to add, e.g. 0ms,500us,1ms.")
    ] = "0ms,250us,500us,1ms,2.5ms",
    ranks: Annotated[int, typer.Option(min=2, help="Tensor-parallel ranks.")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 1,
    width: Annotated[int, typer.Option(help="Model width D.")] = 1536,
    ffn: Annotated[int, typer.Option(help="Feed-forward width.")] = 4096,
    layers: Annotated[int, typer.Option(help="Transformer layers.")] = 20,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 12,
    front_width: Annotated[
        int | None,
        typer.Option(
            help="Width of a narrower anchor: measure paths stitched to the other and back."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Dtype of the weights: float32 or bfloat16.")
    ] = "float32",
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds per latency.")] = 9,
    to: Annotated[
        Path | None, typer.Option("--out", help="Folder for overlap-LINK.json and .png.")
    ] = None,
) -> None:
    """Measure decoding with standard, ladder, parallel and no communication, interleaved.

    Weights are random, and each rank has one torch thread. Prints tokens/s, the ladder's speed-up,
    the bound (no communication at all) and the share of the communication that the ladder hides.
    """
    with user_errors():
        if link not in ("shared_memory", "tcp"):
            raise ConfigError(f"link: expected shared_memory or tcp, got {link!r}")
        if front_width is not None and not 1 <= front_width < width:
            raise ConfigError(f"front-width: expected 1 to {width - 1}, got {front_width}")
        plan = OverlapPlan(
            ModelShape(width, ffn, layers, heads, heads),
            front_width=front_width,
            ranks=ranks,
            batch=batch,
            rounds=rounds,
            dtype=dtype,
            latencies_s=tuple(parse_duration(part, "latency") for part in latency.split(",")),
            tcp=link == "tcp",
        )
        with progress_bar() as progress:
            task = progress.add_task("decoding", total=None)
            try:
                rows = asyncio.run(
                    measure(plan, lambda n, all_: progress.update(task, completed=n, total=all_))
                )
            except RequestError as error:
                raise ConfigError(str(error)) from error
    out.print(_table(plan, rows))
    if to is not None:
        _save(to, f"overlap-{link}" + "-stitched" * bool(front_width), plan, rows)


def _table(plan: OverlapPlan, rows: list[OverlapRow]) -> Table:
    table = Table(title=f"{rows[0].link}, {plan.ranks} ranks, batch {plan.batch}: tokens/s")
    for column in ("latency", "route", *SCHEMES, "ladder", "parallel", "bound", "hidden"):
        table.add_column(column, justify="right")
    for row in rows:
        latency = f"{row.latency_ms:g} ms"
        if row.transport_ms is not None:
            latency += f" ({row.transport_ms:.2f} measured)"
        table.add_row(
            latency,
            row.route,
            *(f"{row.tokens_per_s[scheme]:.1f}" for scheme in SCHEMES),
            f"{row.ladder_over_standard:.2f}x",
            f"{row.parallel_over_standard:.2f}x",
            f"{row.bound:.2f}x",
            "-" if row.hidden is None else f"{100 * row.hidden:.0f} %",
        )
    return table


def _save(folder: Path, name: str, plan: OverlapPlan, rows: list[OverlapRow]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "device": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "plan": asdict(plan),
        "rows": [row.to_dict() for row in rows],
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    _plot(path.with_suffix(".png"), rows)
    err.print(f"Wrote {path} and {path.with_suffix('.png')}")


def _plot(path: Path, rows: list[OverlapRow]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    routes = {row.route: [r for r in rows if r.route == row.route] for row in rows}
    figure, panels = pyplot.subplots(
        1, len(routes), figsize=(6.4 * len(routes), 4), layout="constrained", squeeze=False
    )
    for axes, (route, measured) in zip(panels[0], routes.items(), strict=True):
        latencies = [row.latency_ms for row in measured]
        for scheme in SCHEMES:
            style = "--" if scheme == "no_communication" else "o-"
            label = "bound (no communication)" if scheme == "no_communication" else scheme
            axes.plot(latencies, [row.tokens_per_s[scheme] for row in measured], style, label=label)
        axes.set_xlabel("added one-way latency of the link, ms")
        axes.set_ylabel("tokens/s")
        axes.set_ylim(bottom=0)
        axes.set_title(f"{measured[0].link}, {route}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

"""The command `ladderstitch-loadtest overlap`: residual schemes on a link, as table and plot."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from ladderstitch.bundles import find_bundle
from ladderstitch.cli.console import err, out, parse_duration, progress_bar, user_errors
from ladderstitch.errors import ConfigError, RequestError
from ladderstitch.runtime.device import device_name, versions
from ladderstitch.text.bundle import TextBundle
from ladderstitch_loadtest.benchmarks.overlap import OverlapRow, measure
from ladderstitch_loadtest.benchmarks.overlap_plan import BundlePlan, ModelShape, OverlapPlan


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
    model: Annotated[
        str | None,
        typer.Option(help="Bundle whose paths are measured in place of random weights."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Dtype of the weights: float32 or bfloat16.")
    ] = "float32",
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds per latency.")] = 9,
    losses: Annotated[
        Path | None,
        typer.Option(help="pair.json of `train-language`, with the held-out nats of the schemes."),
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--out", help="Folder for overlap-LINK.json, .md and .png.")
    ] = None,
) -> None:
    """Measure decoding with every residual scheme and with no communication, interleaved.

    Weights are random, and each rank has one torch thread. Prints by scheme the reductions of a
    token, tokens/s, the speed-up (its bound is no communication at all) and the share of the
    communication that is hidden or saved; and held-out losses, measured by `train-language`.
    """
    with user_errors():
        if link not in ("shared_memory", "tcp"):
            raise ConfigError(f"link: expected shared_memory or tcp, got {link!r}")
        if front_width is not None and not 1 <= front_width < width:
            raise ConfigError(f"front-width: expected 1 to {width - 1}, got {front_width}")
        if model is not None and (front_width is not None or losses is not None):
            raise ConfigError("model: expected none with --front-width or --losses")
        fields: dict[str, Any] = {
            "ranks": ranks,
            "batch": batch,
            "rounds": rounds,
            "dtype": dtype,
            "latencies_s": tuple(parse_duration(part, "latency") for part in latency.split(",")),
            "tcp": link == "tcp",
        }
        plan: OverlapPlan
        nats = {} if losses is None else _read_losses(losses)
        if model is not None:
            bundle = TextBundle.load(find_bundle(model))
            plan, nats = BundlePlan.of(bundle, **fields), _read_qualities(bundle)
        else:
            shape = ModelShape(width, ffn, layers, heads, heads)
            plan = OverlapPlan(shape, front_width=front_width, **fields)
        with progress_bar() as progress:
            task = progress.add_task("decoding", total=None)
            try:
                rows = asyncio.run(
                    measure(plan, lambda n, all_: progress.update(task, completed=n, total=all_))
                )
            except RequestError as error:
                raise ConfigError(str(error)) from error
    for row in rows:
        out.print(_table(plan, row, nats))
    if to is not None:
        suffix = "-stitched" * bool(front_width) + "-model" * (model is not None)
        _save(to, f"overlap-{link}{suffix}", plan, rows, nats)


def _read_losses(file: Path) -> dict[str, float]:
    """Return held-out nats per token by scheme; raises `ConfigError` if the file has none."""
    try:
        found = json.loads(file.read_text())["held_out_loss"]
        return {str(name): float(nats) for name, nats in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"losses: {file}: expected held_out_loss by scheme: {error}") from error


def _read_qualities(bundle: TextBundle) -> dict[str, float]:
    """Return the measured held-out nats per token of a bundle's paths by name."""
    if bundle.quality is None:
        return {}
    measured = {
        variant.name: bundle.quality.variants[number].perplexity
        for number, variant in enumerate(bundle.manifest.variants)
    }
    return {name: math.log(p) for name, p in measured.items() if p is not None}


COLUMNS = ("scheme", "nats per token", "reductions", "tokens/s", "over standard", "hidden or saved")


def _cells(plan: OverlapPlan, row: OverlapRow, nats: Mapping[str, float]) -> list[list[str]]:
    """Return the cells of a table of all schemes at one latency."""
    cells = []
    for scheme in plan.schemes:
        hidden = row.hidden[scheme]
        cells.append(
            [
                scheme,
                f"{nats[scheme]:.3f}" if scheme in nats else "-",
                str(row.reductions[scheme]),
                f"{row.tokens_per_s[scheme]:.1f}",
                f"{row.over_standard[scheme]:.2f}x",
                "-" if hidden is None else f"{100 * hidden:.0f} %",
            ]
        )
    return cells


def _title(plan: OverlapPlan, row: OverlapRow) -> str:
    latency = f"{row.latency_ms:g} ms"
    if row.transport_ms is not None:
        latency += f" ({row.transport_ms:.2f} measured)"
    return f"{row.link}, {latency}, {row.route}, {plan.ranks} ranks, batch {plan.batch}"


def _table(plan: OverlapPlan, row: OverlapRow, nats: Mapping[str, float]) -> Table:
    table = Table(title=_title(plan, row))
    for column in COLUMNS:
        is_name = column == "scheme"
        table.add_column(column, justify="left" if is_name else "right", no_wrap=is_name)
    for cells in _cells(plan, row, nats):
        table.add_row(*cells)
    return table


def _markdown(plan: OverlapPlan, row: OverlapRow, nats: Mapping[str, float]) -> str:
    lines = [_title(plan, row), "", " | ".join(("", *COLUMNS, "")).strip()]
    lines.append("| --- |" + " ---: |" * (len(COLUMNS) - 1))
    lines += [" | ".join(("", *cells, "")).strip() for cells in _cells(plan, row, nats)]
    return "\n".join(lines) + "\n"


def _save(
    folder: Path,
    name: str,
    plan: OverlapPlan,
    rows: list[OverlapRow],
    nats: Mapping[str, float],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "device": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "plan": asdict(plan),
        "held_out_nats": dict(nats),
        "rows": [row.to_dict() for row in rows],
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join(_markdown(plan, row, nats) for row in rows))
    _plot(path.with_suffix(".png"), plan, rows)
    err.print(f"Wrote {path} and {path.with_suffix('.png')}")


def _plot(path: Path, plan: OverlapPlan, rows: list[OverlapRow]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    routes = {row.route: [r for r in rows if r.route == row.route] for row in rows}
    figure, panels = pyplot.subplots(
        1, len(routes), figsize=(6.4 * len(routes), 4), layout="constrained", squeeze=False
    )
    for axes, (route, measured) in zip(panels[0], routes.items(), strict=True):
        latencies = [row.latency_ms for row in measured]
        for scheme in plan.schemes:
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

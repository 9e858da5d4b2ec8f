"""The command `frontier`, and the table of a family's variants that other commands print, too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ladderstitch.bundles import EMBEDDED, find_bundle, is_language_bundle
from ladderstitch.cli.bundle_records import quality_records
from ladderstitch.cli.console import Json, err, user_errors
from ladderstitch.cli.measure import (
    QUALITY_COLUMNS,
    BundleFolder,
    show_interval,
)
from ladderstitch.cli.output import Column, Record, format_ms, print_json, print_records
from ladderstitch.errors import ConfigError

if TYPE_CHECKING:
    from ladderstitch.vision.frontier import FrontierRow


def frontier(
    bundle: BundleFolder = EMBEDDED,
    plot: Annotated[Path | None, typer.Option(help="PNG file to draw the frontier to.")] = None,
    all_stitches: Annotated[
        bool, typer.Option("--all", help="List dominated stitches, too.")
    ] = False,
    macs: Annotated[
        bool, typer.Option("--macs", help="Cost in multiply-accumulates instead of latency.")
    ] = False,
    compare: Annotated[
        list[str] | None,
        typer.Option(help="Further image model whose frontier is drawn into the plot."),
    ] = None,
    prune_into: Annotated[
        Path | None,
        typer.Option(
            "--prune", help="Supernets: bundle directory to write, with the frontier's paths only."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the best variants by quality and cost.

    For those on the frontier, no other one has better quality and lower cost.
    """
    from ladderstitch.vision.bundle import VisionBundle
    from ladderstitch.vision.frontier import CostMetric, frontier_rows, plot_frontier, training_note
    from ladderstitch.vision.prune import prune

    with user_errors():
        path = find_bundle(str(bundle))
        if is_language_bundle(path):
            if macs:
                raise ConfigError("macs: expected an image model, got a language model")
            print_paths(path, plot, as_json=as_json)
            if plot is not None:
                err.print(f"wrote {plot}")
            return
        loaded = VisionBundle.load(path)
        metric: CostMetric = "macs" if macs else "latency"
        listed = [row for row in frontier_rows(loaded, metric) if row.on_frontier or all_stitches]
        title = f"{loaded.manifest.name}: frontier of quality and {metric}"
        title = ", ".join((title, *training_note(loaded)))
        records = frontier_records(listed)
        if as_json:
            print_json({"model": loaded.manifest.name, "cost": metric, "variants": records})
        else:
            print_records(records, frontier_columns(records), title=title)
        if plot is not None:
            others = [VisionBundle.load(find_bundle(other)) for other in compare or ()]
            plot_frontier(loaded, plot, metric, others)
            err.print(f"wrote {plot}")
        if prune_into is not None:
            names = prune(loaded, prune_into, metric)
            err.print(f"wrote {prune_into} with {len(names)} paths", soft_wrap=True)


def print_paths(path: Path, plot: Path | None, *, as_json: bool, shown: Path | None = None) -> None:
    """Print the paths of a language model, and draw them if they have been profiled.

    The JSON document names the bundle as `shown`, if it is set.
    """
    from ladderstitch.text.bundle import TextBundle
    from ladderstitch.text.frontier import path_rows, plot_paths, read_latency

    bundle = TextBundle.load(path)
    if bundle.quality is None:
        raise ConfigError(
            f"{path}: not calibrated; run `ladderstitch calibrate {path} --text FILE`"
        )
    latency = read_latency(bundle)
    if latency is None:
        if plot is not None:
            raise ConfigError(f"{path}: not profiled; run `ladderstitch profile {path}`")
        records = quality_records([v.name for v in bundle.manifest.variants], bundle.quality)
        columns: tuple[Column, ...] = QUALITY_COLUMNS
    else:
        columns = PATH_COLUMNS
        records = [
            {
                "variant": row.path,
                "name": row.name,
                "quality": row.quality.value,
                "quality_metric": bundle.quality.metric,
                "nats_per_token": row.nats,
                "token_s": row.token_s,
                "on_frontier": row.on_frontier,
            }
            for row in path_rows(bundle, latency)
        ]
    if as_json:
        named = {} if shown is None else {"bundle": str(shown)}
        model = {"model": bundle.manifest.name, "cost": "latency"}
        print_json({**named, **model, "variants": records})
    else:
        print_records(records, columns, title=f"quality: {bundle.quality.metric}")
    if latency is not None and plot is not None:
        plot_paths(bundle, latency, plot)


PATH_COLUMNS = (
    Column("id", lambda r: str(r["variant"])),
    Column("path", lambda r: str(r["name"]), text=True),
    Column("quality", lambda r: f"{r['quality']:.4f}"),
    Column("nats/token", lambda r: f"{r['nats_per_token']:.3f}"),
    Column("token", lambda r: format_ms(r["token_s"])),
    Column("frontier", lambda r: "yes" if r["on_frontier"] else "", text=True),
)


def frontier_records(rows: list[FrontierRow]) -> list[Record]:
    """Return the measured variants with their costs."""
    return [
        {
            "variant": row.stitch,
            "name": row.name,
            "quality": row.quality.value,
            "low": row.quality.low,
            "high": row.quality.high,
            "median_s": row.median_s,
            "p99_s": row.p99_s,
            "macs": row.macs,
            "parameters": row.parameters,
            "image_size": row.image_size,
            "on_frontier": row.on_frontier,
        }
        for row in rows
    ]


def frontier_columns(records: list[Record]) -> tuple[Column, ...]:
    """Return the columns of the table, with the images' side where the variants differ in it."""
    if len({record["image_size"] for record in records}) < 2:
        return FRONTIER_COLUMNS
    pixels = Column("image", lambda r: f"{r['image_size']} px", drop=4)
    return (*FRONTIER_COLUMNS[:2], pixels, *FRONTIER_COLUMNS[2:])


FRONTIER_COLUMNS = (
    Column("id", lambda r: str(r["variant"])),
    Column("variant", lambda r: str(r["name"]), text=True),
    Column("quality", lambda r: f"{r['quality']:.4f}"),
    Column("95 % interval", show_interval, drop=3),
    Column("batch 1", lambda r: format_ms(r["median_s"])),
    Column("p99", lambda r: format_ms(r["p99_s"])),
    Column("MMACs", lambda r: f"{r['macs'] / 1e6:.1f}", drop=1),
    Column("weights", lambda r: f"{r['parameters'] / 1e6:.2f} M", drop=2),
    Column("frontier", lambda r: "yes" if r["on_frontier"] else "", text=True),
)

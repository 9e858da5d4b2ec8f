"""Commands that measure a bundle: quality, latency, the frontier of both; and `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ladderstitch.bundles import EMBEDDED, find_bundle
from ladderstitch.cli.console import err, out, progress_bar, user_errors
from ladderstitch.vision.bundle import Bundle, write_table

BundleFolder = Annotated[
    Path,
    typer.Argument(help="Bundle directory, or a model's name.", show_default="the embedded one"),
]


def calibrate(
    data: Annotated[Path, typer.Option(help="Folder of gzipped IDX files.")],
    bundle: BundleFolder = EMBEDDED,
    split: Annotated[str, typer.Option(help="Which images of the folder.")] = "t10k",
    name: Annotated[str, typer.Option(help="How to call them.")] = "Fashion-MNIST test",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 100,
) -> None:
    """Measure the quality of every stitch, with 95 % intervals, into quality.json. Resumable."""
    from ladderstitch.training.vision.calibrate import calibrate as run
    from ladderstitch.training.vision.dataset import load_idx_folder

    with user_errors(), progress_bar() as progress:
        bundle = find_bundle(str(bundle))
        run(Bundle.load(bundle), load_idx_folder(data, split), name, batch_size, progress)
    err.print(f"Wrote {bundle / 'quality.json'}; next: ladderstitch profile {bundle}")


def profile(
    bundle: BundleFolder = EMBEDDED,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="torch threads")] = 1,
    rounds: Annotated[int, typer.Option(min=2, help="measurements of each pair")] = 40,
) -> None:
    """Measure the latency of every stitch and batch size on this device, into latency.json."""
    import torch

    from ladderstitch.runtime.device import resolve_device, resolve_dtype
    from ladderstitch.training.vision.calibrate import BATCH_SIZES
    from ladderstitch.training.vision.calibrate import profile as run

    with user_errors(), progress_bar() as progress:
        bundle = find_bundle(str(bundle))
        loaded = Bundle.load(bundle)
        where = resolve_device(device)
        table = run(
            loaded,
            device=torch.device(where),
            dtype=resolve_dtype(dtype, where),
            threads=threads,
            rounds=rounds,
            batch_sizes=BATCH_SIZES,
            progress=progress,
        )
        write_table(bundle / "latency.json", table)
    err.print(f"Wrote {bundle / 'latency.json'}; next: ladderstitch frontier {bundle}")


def frontier(
    bundle: BundleFolder = EMBEDDED,
    plot: Annotated[Path | None, typer.Option(help="Also draw it, as a PNG file.")] = None,
    all_stitches: Annotated[bool, typer.Option("--all", help="List dominated ones too.")] = False,
    macs: Annotated[bool, typer.Option(help="Over arithmetic instead of latency.")] = False,
) -> None:
    """Show quality against latency (or arithmetic): the stitches that no other beats in both."""
    from ladderstitch.vision.frontier import Over, plot_frontier, rows

    with user_errors():
        loaded = Bundle.load(find_bundle(str(bundle)))
        over: Over = "macs" if macs else "latency"
        listed = [row for row in rows(loaded, over) if row.on_frontier or all_stitches]
        table = Table(title=f"{loaded.manifest.name}: frontier of quality and {over}")
        for column in (
            "id",
            "stitch",
            "quality",
            "95 % interval",
            "batch 1",
            "p99",
            "MMACs",
            "parameters",
            "frontier",
        ):
            table.add_column(column)
        for row in listed:
            table.add_row(
                str(row.stitch),
                row.name,
                f"{row.quality.value:.4f}",
                f"{row.quality.low:.4f} - {row.quality.high:.4f}",
                f"{row.median_s * 1e3:.2f} ms",
                f"{row.p99_s * 1e3:.2f} ms",
                f"{row.macs / 1e6:.1f}",
                f"{row.parameters / 1e6:.2f} M",
                "yes" if row.on_frontier else "",
            )
        out.print(table)
        if plot is not None:
            plot_frontier(loaded, plot, over)
            err.print(f"Drew {plot}")


def verify(
    cases: Annotated[list[Path], typer.Argument(help="CASE.safetensors, each beside its .json")],
) -> None:
    """Check importer and forward pass against recorded outputs of the original code.

    Prints a line per case; exits with 1 if any fails.
    """
    from ladderstitch.importers.verify import verify_case

    failed = 0
    with user_errors():
        for path in cases:
            verdict = verify_case(path)
            failed += not verdict.passed
            word = "[green]pass[/]" if verdict.passed else "[bold red]FAIL[/]"
            out.print(
                f"{word} {verdict.case}: {verdict.family}, {verdict.checked} "
                f"{verdict.what}, largest relative error "
                f"{verdict.largest_relative_error:.1e} {verdict.detail}".rstrip(),
                highlight=False,
                soft_wrap=True,
            )
    raise typer.Exit(1 if failed else 0)


def register(app: typer.Typer) -> None:
    group = "Measure and check"
    app.command(rich_help_panel=group)(calibrate)
    app.command(rich_help_panel=group)(profile)
    app.command(rich_help_panel=group)(frontier)
    app.command(rich_help_panel=group)(verify)

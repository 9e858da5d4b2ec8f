"""The commands that measure a bundle: `calibrate`, `profile`, `frontier`; and `verify`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ladderstitch.bundles import EMBEDDED, find_bundle, is_language_bundle
from ladderstitch.cli.console import err, out, plain_table, progress_bar, user_errors
from ladderstitch.errors import ConfigError
from ladderstitch.vision.bundle import VisionBundle, write_table

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

    from ladderstitch.scheduling.profiles import LatencyProfile, QualityTable
    from ladderstitch.vision.frontier import FrontierRow

BundleFolder = Annotated[
    Path,
    typer.Argument(help="Directory of a bundle, or name of a model.", show_default="fashion-mnist"),
]


def calibrate(
    bundle: BundleFolder = EMBEDDED,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Image models: folder with one subfolder per class, CSV file of path,label, or "
            "folder of gzipped IDX files; with a metric, CSV file of path,target."
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Image models: folder of images without labels; measures the agreement with the "
            "most expensive network. For models of tensors: folder of .npy files."
        ),
    ] = None,
    targets: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a PNG mask or .npy file per image, of the same name, for `--metric`."
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="Image models: accuracy, agreement, cosine, mean-iou, rmse, or module:function, a "
            "function of outputs and target that returns 0 to 1 (default: by the outputs)."
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Image models: split of IDX files to measure on.")
    ] = "t10k",
    name: Annotated[
        str | None,
        typer.Option(help="Image models: name of the data in quality.json (default: the file's)."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Image models: images per batch.")] = 100,
    text: Annotated[
        Path | None, typer.Option(help="Language models: held-out text file to measure on.")
    ] = None,
) -> None:
    """Measure the quality of every variant with 95 % intervals, and write quality.json.

    The measurement of an image model resumes if it was interrupted.
    """
    from ladderstitch.training.vision.calibrate import calibrate_files

    with user_errors(), progress_bar() as progress:
        path = find_bundle(str(bundle))
        if is_language_bundle(path):
            _calibrate_language(path, text, progress)
            following = f"ladderstitch serve --model {bundle}"
        else:
            loaded = VisionBundle.load(path)
            calibrate_files(
                loaded, data, images, split, name, batch_size, progress, metric, targets
            )
            following = f"ladderstitch profile {bundle}"
    err.print(f"wrote {path / 'quality.json'}; next: {following}")


def _calibrate_language(path: Path, text: Path | None, progress: Progress) -> None:
    from ladderstitch.text.bundle import TextBundle
    from ladderstitch.training.text.calibrate import DEFAULT_SAMPLE
    from ladderstitch.training.text.calibrate import calibrate as run

    if text is None:
        raise ConfigError("text: expected a held-out text for a language model, got none")
    loaded = TextBundle.load(path, calibrated=False)
    table = run(loaded, text, DEFAULT_SAMPLE, 1, progress)
    out.print(quality_table([v.name for v in loaded.manifest.variants], table))


def quality_table(names: Sequence[str], table: QualityTable) -> Table:
    """Return the qualities of a language model's paths, by their names in order of their ids."""
    rows = [
        (
            str(number),
            name,
            f"{quality.value:.4f}",
            f"{quality.low:.4f}-{quality.high:.4f}",
            f"{quality.perplexity:.2f}",
        )
        for number, (name, quality) in enumerate(
            zip(names, (table.variants[n] for n in range(len(names))), strict=True)
        )
    ]
    columns = ("id", "path", table.metric, "95 % interval", "perplexity")
    return plain_table(columns, rows, text=("path",))


def profile(
    bundle: BundleFolder = EMBEDDED,
    device: Annotated[str, typer.Option(help="Device: cpu, cuda or auto.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Number format: float32, bfloat16, float16 or auto.")
    ] = "auto",
    runtime: Annotated[str, typer.Option(help="Runtime, as for `serve`: auto, onnx or torch.")] = (
        "auto"
    ),
    threads: Annotated[int, typer.Option(min=1, help="Number of threads of one batch.")] = 1,
    rounds: Annotated[
        int, typer.Option(min=2, help="Measurements of each stitch and batch size.")
    ] = 40,
) -> None:
    """Measure the latency of every stitch and batch size on this device; write latency.json.

    Of language models: of steps of one stream on every path, in float32 on a CPU.
    """
    from ladderstitch.training.vision.calibrate import BATCH_SIZES
    from ladderstitch.training.vision.calibrate import profile as run
    from ladderstitch.vision.engine.startup import make_config

    with user_errors(), progress_bar() as progress:
        bundle = find_bundle(str(bundle))
        if is_language_bundle(bundle):
            if (device, dtype, runtime) != ("auto", "auto", "auto"):
                raise ConfigError("device, dtype and runtime: expected none for a language model")
            table = _profile_paths(bundle, rounds, threads, progress)
        else:
            loaded = VisionBundle.load(bundle)
            config = make_config(
                loaded,
                runtime=runtime,
                device=device,
                dtype=dtype,
                threads=threads,
                max_batch_size=BATCH_SIZES[-1],
            )
            table = asyncio.run(run(loaded, config, rounds, progress))
        write_table(bundle / "latency.json", table)
    err.print(f"wrote {bundle / 'latency.json'}; next: ladderstitch frontier {bundle}")


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
) -> None:
    """Show the frontier: the stitches for which no other has better quality and lower cost."""
    from ladderstitch.vision.frontier import CostMetric, frontier_rows, plot_frontier
    from ladderstitch.vision.prune import prune

    with user_errors():
        path = find_bundle(str(bundle))
        if is_language_bundle(path):
            if macs:
                raise ConfigError("macs: expected an image model, got a language model")
            _print_paths(path, plot)
            return
        loaded = VisionBundle.load(path)
        metric: CostMetric = "macs" if macs else "latency"
        listed = [row for row in frontier_rows(loaded, metric) if row.on_frontier or all_stitches]
        title = f"{loaded.manifest.name}: frontier of quality and {metric}"
        out.print(f"[bold]{title}[/]", highlight=False)
        out.print(frontier_table(listed))
        if plot is not None:
            others = [VisionBundle.load(find_bundle(other)) for other in compare or ()]
            plot_frontier(loaded, plot, metric, others)
            err.print(f"wrote {plot}")
        if prune_into is not None:
            names = prune(loaded, prune_into, metric)
            err.print(f"wrote {prune_into} with {len(names)} paths", soft_wrap=True)


def _profile_paths(path: Path, rounds: int, threads: int, progress: Progress) -> LatencyProfile:
    """Return the latencies of the paths of a language model."""
    from ladderstitch.text.bundle import TextBundle
    from ladderstitch.training.text.profile import profile

    return profile(TextBundle.load(path, calibrated=False), rounds, threads, progress)


def _print_paths(path: Path, plot: Path | None) -> None:
    """Print the paths of a language model, and draw them if they have been profiled."""
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
        out.print(quality_table([v.name for v in bundle.manifest.variants], bundle.quality))
        return
    rows = [
        (
            str(row.path),
            row.name,
            f"{row.quality.value:.4f}",
            f"{row.nats:.3f}",
            f"{1e3 * row.token_s:.2f} ms",
            "yes" if row.on_frontier else "",
        )
        for row in path_rows(bundle, latency)
    ]
    columns = ("id", "path", bundle.quality.metric, "nats/token", "token", "frontier")
    out.print(plain_table(columns, rows, text=("path", "frontier")))
    if plot is not None:
        plot_paths(bundle, latency, plot)
        err.print(f"wrote {plot}")


def frontier_table(rows: list[FrontierRow]) -> Table:
    """Return a table of the measured variants."""
    columns = ("id", "stitch", "quality", "95 % interval", "batch 1", "p99", "MMACs", "weights")
    cells = [
        (
            str(row.stitch),
            row.name,
            f"{row.quality.value:.4f}",
            f"{row.quality.low:.4f}-{row.quality.high:.4f}",
            f"{row.median_s * 1e3:.2f} ms",
            f"{row.p99_s * 1e3:.2f} ms",
            f"{row.macs / 1e6:.1f}",
            f"{row.parameters / 1e6:.2f} M",
            "yes" if row.on_frontier else "",
        )
        for row in rows
    ]
    return plain_table((*columns, "frontier"), cells, text=("stitch",))


def verify(
    cases: Annotated[
        list[Path], typer.Argument(help="Files CASE.safetensors, each next to its CASE.json.")
    ],
) -> None:
    """Check the importer and the forward pass against recorded outputs of the original code.

    Prints one line per case. Exits with 1 if a case fails.
    """
    from ladderstitch.importers.verify import verify_case

    failed = 0
    with user_errors():
        for path in cases:
            result = verify_case(path)
            failed += not result.passed
            word = "[green]pass[/]" if result.passed else "[bold red]FAIL[/]"
            out.print(
                f"{word} {result.name}: {result.family}, {result.num_checked} "
                f"{result.checked}, largest relative error "
                f"{result.max_relative_error:.1e} {result.detail}".rstrip(),
                highlight=False,
                soft_wrap=True,
            )
    raise typer.Exit(1 if failed else 0)


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    group = "Measure and check"
    app.command(rich_help_panel=group)(calibrate)
    app.command(rich_help_panel=group)(profile)
    app.command(rich_help_panel=group)(frontier)
    app.command(rich_help_panel=group)(verify)

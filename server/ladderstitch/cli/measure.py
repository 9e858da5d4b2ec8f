"""The commands that measure a bundle: `calibrate` and `profile`; and `verify`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ladderstitch.bundles import EMBEDDED, find_bundle, is_language_bundle
from ladderstitch.cli.bundle_records import latency_records, quality_records, variant_records
from ladderstitch.cli.console import Json, err, out, progress_bar, user_errors
from ladderstitch.cli.output import Column, Record, print_json, print_records
from ladderstitch.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress

    from ladderstitch.scheduling.profiles import LatencyProfile

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
    as_json: Json = False,
) -> None:
    """Measure the quality of every variant.

    Writes quality.json, which has 95 % intervals. The measurement of an image model resumes if it
    was interrupted.
    """
    from ladderstitch.training.vision.calibrate import calibrate_files
    from ladderstitch.vision.bundle import VisionBundle

    measured: list[Record] = []
    with user_errors(), progress_bar() as progress:
        path = find_bundle(str(bundle))
        if is_language_bundle(path):
            measured = _calibrate_language(path, text, progress)
            following = f"ladderstitch serve --model {bundle}"
        else:
            loaded = VisionBundle.load(path)
            calibrate_files(
                loaded, data, images, split, name, batch_size, progress, metric, targets
            )
            following = f"ladderstitch profile {bundle}"
            if as_json:
                measured = variant_records(path)
    print_measured(path, measured, as_json=as_json)
    err.print(f"wrote {path / 'quality.json'}; next: {following}")


def _calibrate_language(path: Path, text: Path | None, progress: Progress) -> list[Record]:
    from ladderstitch.text.bundle import TextBundle
    from ladderstitch.training.text.calibrate import DEFAULT_SAMPLE
    from ladderstitch.training.text.calibrate import calibrate as run

    if text is None:
        raise ConfigError("text: expected a held-out text for a language model, got none")
    loaded = TextBundle.load(path, calibrated=False)
    table = run(loaded, text, DEFAULT_SAMPLE, 1, progress)
    return quality_records([v.name for v in loaded.manifest.variants], table)


def show_interval(record: Record) -> str:
    """Return the 95 % interval of a quality."""
    return f"{record['low']:.4f}-{record['high']:.4f}"


QUALITY_COLUMNS = (
    Column("id", lambda r: str(r["variant"])),
    Column("path", lambda r: str(r["name"]), text=True),
    Column("quality", lambda r: f"{r['quality']:.4f}"),
    Column("95 % interval", show_interval),
    Column("perplexity", lambda r: f"{r['perplexity']:.2f}"),
)


def print_measured(path: Path, records: list[Record], *, as_json: bool) -> None:
    """Print the variants of a bundle that were measured, or the records as one JSON document."""
    if as_json:
        print_json({"bundle": str(path), "variants": records})
    elif records:
        print_records(records, QUALITY_COLUMNS)


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
    as_json: Json = False,
) -> None:
    """Measure the latency of every variant here.

    Writes latency.json, of every batch size on this device. Of language models: of steps of one
    stream on every path, in float32 on a CPU.
    """
    import asyncio

    from ladderstitch.training.vision.calibrate import BATCH_SIZES
    from ladderstitch.training.vision.calibrate import profile as run
    from ladderstitch.vision.bundle import VisionBundle, write_table
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
    if as_json:
        here = {"bundle": str(bundle), "device": table.device, "threads": table.threads}
        print_json({**here, "variants": latency_records(bundle, table)})
    err.print(f"wrote {bundle / 'latency.json'}; next: ladderstitch frontier {bundle}")


def _profile_paths(path: Path, rounds: int, threads: int, progress: Progress) -> LatencyProfile:
    """Return the latencies of the paths of a language model."""
    from ladderstitch.text.bundle import TextBundle
    from ladderstitch.training.text.profile import profile

    return profile(TextBundle.load(path, calibrated=False), rounds, threads, progress)


def verify(
    cases: Annotated[
        list[Path], typer.Argument(help="Files CASE.safetensors, each next to its CASE.json.")
    ],
    as_json: Json = False,
) -> None:
    """Check forward passes against recorded outputs.

    The original code of each family computed them. Prints one line per case. Exits with 1 if a case
    fails.
    """
    from ladderstitch.importers.verify import verify_case

    failed, records = 0, []
    with user_errors():
        for path in cases:
            result = verify_case(path)
            failed += not result.passed
            records.append(dataclasses.asdict(result))
            if as_json:
                continue
            word = "[green]pass[/]" if result.passed else "[bold red]FAIL[/]"
            out.print(
                f"{word} {result.name}: {result.family}, {result.num_checked} "
                f"{result.checked}, largest relative error "
                f"{result.max_relative_error:.1e} {result.detail}".rstrip(),
                highlight=False,
                soft_wrap=True,
            )
    if as_json:
        print_json({"cases": records})
    raise typer.Exit(1 if failed else 0)

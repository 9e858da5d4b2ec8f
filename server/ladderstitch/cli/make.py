"""The command `make`, which stitches networks of the user into a family."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ladderstitch.bundles import models_home
from ladderstitch.cli.console import Json, err, out, progress_bar, user_errors
from ladderstitch.cli.language_families import (
    LanguageOptions,
    are_language_models,
    make_language_family,
)
from ladderstitch.cli.network_options import (
    Crop,
    ImageSize,
    InputShape,
    Labels,
    Mean,
    Outputs,
    Resize,
    Std,
    build_info,
    build_settings,
)
from ladderstitch.cli.output import print_json, print_records
from ladderstitch.errors import ConfigError

Networks = Annotated[
    list[Path],
    typer.Argument(
        help="ONNX files, or a family.yaml that lists them; or folders or names of language "
        "models. The order is of no effect."
    ),
]
Name = Annotated[str, typer.Option(help="Name of the model in requests.")]


def make(
    networks: Networks,
    name: Name,
    images: Annotated[
        Path | None, typer.Option(help="Folder of PNG or JPEG files, without labels, to fit on.")
    ] = None,
    labelled: Annotated[
        Path | None,
        typer.Option(
            help="Images to measure accuracy on: a folder with one subfolder per class, or a CSV "
            "file of path,label. Unset: agreement with the most expensive network."
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Language models: text file to fit stitching layers on.")
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="Language models: held-out text to measure all paths on.")
    ] = None,
    minutes: Annotated[
        float,
        typer.Option(
            min=0, help="Language models: time to train the stitching layers after the fit."
        ),
    ] = 0.0,
    into: Annotated[
        Path | None, typer.Option(help="Bundle directory to write (default: NAME).")
    ] = None,
    paths: Annotated[int, typer.Option(min=0, max=64, help="Most stitched paths to keep.")] = 12,
    plot: Annotated[
        Path | None, typer.Option(help="PNG file of the frontier (default: in the bundle).")
    ] = None,
    labels: Labels = None,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    crop: Crop = None,
    resize: Resize = None,
    outputs: Outputs = "auto",
    input_shape: InputShape = None,
    licence: Annotated[str, typer.Option(help="Licence of the weights.")] = "not stated",
    rounds: Annotated[int, typer.Option(min=2, help="Measurements of each latency.")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="Number of threads of one batch.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of views and splits.")] = 0,
    replace: Annotated[
        bool, typer.Option("--replace", help="Write over a bundle that exists.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Stitch networks or language models into a family.

    The family is measured, and its frontier drawn. Networks are ONNX files of one task. Affine maps
    between the networks are fitted without labels. Paths of ONNX networks that are neither cheaper
    nor better than another one are dropped.

    Language models have one tokenizer, and keys and values of one shape; their weights stay as they
    are.

    Example: `ladderstitch make small.onnx large.onnx --images photos/ --labelled val/ --name mine`

    Example: `ladderstitch make ./small ./large --text train.txt --held-out held.txt --name mine`
    """
    from ladderstitch.importers.make_family import MakeOptions, make_family
    from ladderstitch.importers.make_target import MakeTarget
    from ladderstitch.vision.frontier import plot_frontier

    with user_errors():
        if are_language_models(networks):
            if images is not None or labelled is not None:
                raise ConfigError("images, labelled: expected none for language models")
            given = LanguageOptions(
                name=name,
                text=text,
                held_out=held_out,
                into=into,
                plot=plot,
                paths=paths,
                minutes=minutes,
                licence=licence,
                rounds=rounds,
                threads=threads,
                seed=seed,
                replace=replace,
            )
            make_language_family(networks, given, as_json=as_json)
            return
        if text is not None or held_out is not None or minutes:
            raise ConfigError("text, held-out, minutes: expected none for ONNX networks")
        folder = into or models_home() / name
        target = MakeTarget(folder, name, plot, replace)
        target.check()
        settings = build_settings(labels, mean, std, image_size, crop, resize)
        info = build_info(name, licence, settings, outputs, input_shape)
        options = MakeOptions(images, labelled, paths, seed)
        with target.staged() as made:
            with progress_bar() as progress:
                make_family(networks, info, options, made, progress)
                bundle = _profile(made, rounds, threads, progress)
            plot_frontier(bundle, plot or made / "frontier.png")
            _print_frontier(bundle, folder, as_json=as_json)
    drawn = plot or folder / "frontier.png"
    err.print(f"wrote {folder} and {drawn}", soft_wrap=True)
    served = name if into is None else folder
    if not as_json:
        out.print(f"ladderstitch serve --model {served}", highlight=False, soft_wrap=True)


def _profile(folder: Path, rounds: int, threads: int, progress: Any) -> Any:
    """Write the latency profile of a bundle, and return the bundle with it."""
    import asyncio

    from ladderstitch.training.vision.calibrate import BATCH_SIZES
    from ladderstitch.training.vision.calibrate import profile as run
    from ladderstitch.vision.bundle import VisionBundle, write_table
    from ladderstitch.vision.engine.startup import make_config

    bundle = VisionBundle.load(folder)
    config = make_config(
        bundle,
        runtime="auto",
        device="cpu",
        dtype="auto",
        threads=threads,
        max_batch_size=BATCH_SIZES[-1],
    )
    write_table(folder / "latency.json", asyncio.run(run(bundle, config, rounds, progress)))
    return VisionBundle.load(folder)


def _print_frontier(bundle: Any, folder: Path, *, as_json: bool) -> None:
    from ladderstitch.cli.frontier import FRONTIER_COLUMNS, frontier_records
    from ladderstitch.vision.frontier import frontier_rows

    records = frontier_records(frontier_rows(bundle))
    if as_json:
        print_json({"bundle": str(folder), "variants": records})
    else:
        print_records(records, FRONTIER_COLUMNS)

"""The commands for networks of the user: `export`, `inspect` and `make`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from ladderstitch.bundles import models_home
from ladderstitch.cli.console import Json, err, out, progress_bar, user_errors
from ladderstitch.cli.language_families import (
    LanguageOptions,
    are_language_models,
    make_language_family,
)
from ladderstitch.cli.output import Column, print_json, print_records
from ladderstitch.errors import ConfigError

Networks = Annotated[
    list[Path],
    typer.Argument(
        help="ONNX files, or a family.yaml that lists them; or folders or names of language "
        "models. The order is of no effect."
    ),
]
Name = Annotated[str, typer.Option(help="Name of the model in requests.")]
Labels = Annotated[
    Path | None,
    typer.Option(help="Text file with one label per line (default: from config.json)."),
]
Mean = Annotated[
    str | None, typer.Option(help="Mean of each channel of pixels in [0, 1], e.g. 0.5,0.5,0.5.")
]
Std = Annotated[
    str | None, typer.Option(help="Standard deviation of each channel, in the form of `--mean`.")
]
ImageSize = Annotated[
    int | None,
    typer.Option(min=1, help="Side of the images in pixels, if the file leaves it open."),
]
Crop = Annotated[
    str | None,
    typer.Option(
        help="Side of the centred square that is kept, as a share of the shorter side, or "
        "`whole`: the image is stretched."
    ),
]
Resize = Annotated[str | None, typer.Option(help="Interpolation: bilinear or bicubic.")]
Outputs = Annotated[
    str,
    typer.Option(
        help="What the networks return: scores, tensors, or auto: one tensor [batch, K] is scores."
    ),
]
InputShape = Annotated[
    str | None,
    typer.Option(
        help="Shape of one input, e.g. 3,16,112,112, if it is no image and the file leaves it open."
    ),
]


def export(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder that transformers wrote, timm:NAME, or module:function of your own code, "
            "which returns a torch module."
        ),
    ],
    output: Annotated[Path, typer.Option(help="ONNX file to write.")],
    shape: Annotated[
        str | None,
        typer.Option(help="Shape of one input, e.g. 3,224,224 (default: what the source states)."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of a network of timm.", show_default=False)
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Let timm download its weights.")
    ] = False,
    outputs: Annotated[
        str | None,
        typer.Option(
            help="Outputs by name, e.g. pooler_output,last_hidden_state (default: scores, or else "
            "the embedding of an image; all of your own code)."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a torch network to ONNX, and check the file.

    It has the network's preprocessing and labels. The outputs of the file and of the network must
    be equal on random inputs. transformers or timm must be installed for networks of theirs.

    Example: `ladderstitch export ./my-network --output small.onnx`
    """
    from ladderstitch.importers.export_network import export_network
    from ladderstitch.importers.torch_sources import SourceOptions

    with user_errors(), err.status("exporting"):
        options = SourceOptions(parse_shape(shape), checkpoint, pretrained)
        chosen = tuple(outputs.split(",")) if outputs is not None else ()
        report = export_network(source, output, options, chosen)
    if as_json:
        print_json(
            {
                "input": report.shape,
                "outputs": report.outputs,
                "relative_difference": report.difference,
                "files": [str(file) for file in report.files],
            }
        )
    else:
        for name, sizes in ({"input": report.shape} | report.outputs).items():
            shape = ", ".join(map(str, ("batch", *sizes)))
            out.print(f"{name}: [{shape}]", highlight=False, markup=False)
        out.print(
            f"largest difference to the network: {report.difference:.1e} of the largest output",
            highlight=False,
        )
    err.print(f"wrote {', '.join(map(str, report.files))}", soft_wrap=True)


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """Return the sizes of an option, which commas separate, or None if it is not given.

    Raises `ConfigError` for anything else.
    """
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"shape: expected sizes such as 3,224,224, got {text}")
    return tuple(map(int, parts))


def inspect(
    model: Annotated[Path, typer.Argument(help="ONNX file.")],
    image_size: ImageSize = None,
    as_json: Json = False,
) -> None:
    """List tensors, costs and cut points of an ONNX file.

    A cut is a float32 tensor with the batch first through which all data of the network pass.

    Example: `ladderstitch inspect small.onnx`
    """
    from ladderstitch.importers.inspect_network import inspect_network

    with user_errors():
        report = inspect_network(model, image_size)
    tensors = [dict(zip(TENSOR_FIELDS, row, strict=True)) for row in report.tensors]
    cuts = [dict(zip(CUT_FIELDS, row, strict=True)) for row in report.cuts]
    if as_json:
        print_json(
            {
                "file": str(model),
                "parameters": report.parameters,
                "macs": report.macs,
                "summary": report.summary,
                "tensors": tensors,
                "cuts": cuts,
            }
        )
        return
    costs = f"parameters: {report.parameters:,}; MACs per image: {report.macs}"
    note = f"{costs}\ncut points: {report.summary}"
    print_records(tensors, _text_columns(TENSOR_FIELDS), title=model.name, note=note)
    if cuts:
        out.print()
        print_records(cuts, _text_columns(CUT_FIELDS))


TENSOR_FIELDS = ("tensor", "name", "type", "shape")
CUT_FIELDS = ("cut", "shape", "mmacs_before", "mmacs_after", "tensor")


def _text_columns(fields: tuple[str, ...]) -> list[Column]:
    """Return columns of texts, which the fields are."""
    return [
        Column(field, lambda record, field=field: str(record[field]), text=True)  # type: ignore[misc]
        for field in fields
    ]


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


def import_networks(
    files: list[Path],
    into: Path,
    *,
    name: str,
    licence: str,
    labels: Path | None,
    mean: str | None,
    std: str | None,
    image_size: int | None,
    outputs: str,
    input_shape: str | None,
) -> str:
    """Write the bundle of independent ONNX networks; return their number and what to do next."""
    from ladderstitch.importers.onnx_bundle import import_networks as run

    settings = build_settings(labels, mean, std, image_size, None, None)
    bundle = run(files, build_info(name, licence, settings, outputs, input_shape), into)
    count = len(bundle.manifest.variants())
    known = f" of {bundle.quality.metric} quality" if bundle.quality is not None else ""
    given = "--images" if bundle.manifest.outputs else "--data"
    step = f"serve --model {into}" if known else f"calibrate {into} {given} FOLDER"
    return f"{count} networks{known}; next: ladderstitch {step}"


def build_info(
    name: str, licence: str, settings: Any, outputs: str, input_shape: str | None
) -> Any:
    """Return what the user states about a family; raises `ConfigError` for an unknown choice."""
    from ladderstitch.importers.network_outputs import OutputChoice
    from ladderstitch.importers.onnx_networks import FamilyInfo

    known: tuple[OutputChoice, ...] = get_args(OutputChoice)
    for choice in known:
        if choice == outputs:
            return FamilyInfo(name, licence, settings, choice, parse_shape(input_shape))
    raise ConfigError(f"outputs: expected one of {known}, got {outputs}")


def build_settings(
    labels: Path | None,
    mean: str | None,
    std: str | None,
    image_size: int | None,
    crop: str | None,
    resize: str | None,
) -> Any:
    """Return the settings of images that options state.

    Raises `ConfigError` for values that cannot be read.
    """
    from ladderstitch.importers.image_settings import RESAMPLING, WHOLE, ImageSettings

    if resize is not None and resize not in RESAMPLING:
        raise ConfigError(f"resize: expected bilinear or bicubic, got {resize}")
    share: float | str | None = crop
    if crop is not None and crop != WHOLE:
        share = (parse_numbers("crop", crop) or (0.0,))[0]
        if not 0 < share <= 1:
            raise ConfigError(f"crop: expected a share above 0 and up to 1, or {WHOLE}, got {crop}")
    if min(parse_numbers("std", std) or (1.0,)) <= 0:
        raise ConfigError(f"std: expected positive numbers, got {std}")
    try:
        listed = None if labels is None else tuple(labels.read_text().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"labels: {error}") from error
    return ImageSettings(
        size=None if image_size is None else (image_size, image_size),
        mean=parse_numbers("mean", mean),
        std=parse_numbers("std", std),
        crop=share,
        resize=None if resize is None else RESAMPLING[resize],
        labels=listed,
        source="options",
    )


def parse_numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Return the numbers of an option, which commas separate, or None if it is not given.

    Raises `ConfigError` for anything else.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option}: expected numbers such as 0.5,0.5,0.5, got {text}") from None

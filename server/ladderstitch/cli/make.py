"""Commands that make a family: fetch data, train anchors, stitch them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ladderstitch.bundles import find_bundle
from ladderstitch.cli.console import err, out, progress_bar, user_errors
from ladderstitch.errors import ConfigError

RecipeFile = Annotated[Path, typer.Argument(help="YAML recipe, e.g. examples/*/recipe.yaml")]
DataFolder = Annotated[Path, typer.Option("--data", help="Folder of gzipped IDX files.")]
RunFolder = Annotated[Path, typer.Option("--run", help="Where checkpoints, logs and weights go.")]


def fetch(
    what: Annotated[
        str,
        typer.Argument(
            help="fashion-mnist, brown, austen (data), smollm2 (language model), "
            "efficientnet-lite (photographs, 1,000 labels)"
        ),
    ],
    into: Annotated[
        Path | None,
        typer.Option(help="Folder to put it in; default: data/NAME, or where models are kept."),
    ] = None,
) -> None:
    """Download a data set that a recipe names, or a model to serve. Needs no root."""
    from ladderstitch.bundles import models_home
    from ladderstitch.importers import fetch_efficientnet as efficientnet
    from ladderstitch.importers.fetch import MODELS, fetch_data, fetch_model

    with user_errors():
        if what == efficientnet.NAME:
            folder = into or models_home() / what
            with progress_bar() as progress:
                right = efficientnet.fetch_efficientnet(folder, progress)
            _show_right(right)
            out.print(f"{what} is in {folder}; next: ladderstitch serve --model {into or what}")
            return
        if what not in MODELS:
            folder = into or Path("data") / what
            fetch_data(what, folder)
            out.print(f"{what} is in {folder}")
            return
        folder = into or models_home() / what
        with progress_bar() as progress:
            task = progress.add_task(f"importing {what}", total=None)
            fetch_model(
                what, folder, lambda done, all_: progress.update(task, completed=done, total=all_)
            )
    served = what if into is None else folder
    out.print(f"{what} is in {folder}; next: ladderstitch serve --model {served}")


def _show_right(right: dict[int, int]) -> None:
    listed = ", ".join(f"{stitch}: {count}" for stitch, count in right.items())
    out.print(f"right of 20 labelled photographs, by stitch: {listed}")


def train(recipe: RecipeFile, data: DataFolder, run: RunFolder) -> None:
    """Train a family's anchors from scratch, largest first. Resumes where it was stopped."""
    from ladderstitch.training.vision.anchors import train_anchors
    from ladderstitch.training.vision.dataset import load_idx_folder
    from ladderstitch.training.vision.recipe import Recipe

    with user_errors(), progress_bar() as progress:
        train_anchors(Recipe.load(recipe), load_idx_folder(data, "train"), run, progress)
    err.print(f"Anchors are in {run}; next: ladderstitch stitch {recipe} ...")


def stitch(
    recipe: RecipeFile,
    data: DataFolder,
    run: RunFolder,
    bundle: Annotated[Path, typer.Option(help="Bundle directory to write.")],
) -> None:
    """Join trained anchors into a stitchable family and write its bundle.

    Stitching layers start from least squares on the anchors' features; then everything is tuned
    jointly, one stitch a step, taught by the labels and by the largest anchor. Resumable.
    """
    from ladderstitch.training.vision.dataset import load_idx_folder
    from ladderstitch.training.vision.recipe import Recipe
    from ladderstitch.training.vision.stitch import export_family, stitch_family

    with user_errors(), progress_bar() as progress:
        parsed = Recipe.load(recipe)
        model = stitch_family(parsed, load_idx_folder(data, "train"), run, progress)
        export_family(parsed, model, bundle)
    err.print(f"Wrote {bundle}; next: ladderstitch calibrate {bundle} --data {data}")


def import_(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            help="A stitched family's file, or plain networks, smallest first (.safetensors, .pth)."
        ),
    ],
    into: Annotated[Path, typer.Option(help="Bundle directory to write.")],
    family: Annotated[
        str | None,
        typer.Option(
            help="Of a stitched family's file: snnet-deit, snnet-swin, snnet-resnet, "
            "snnet-resnet-swin, snnet-levit, snnetv2, learngene-pool."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="The family's sizes, JSON or YAML; default: the published ones."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of photographs: plain networks are stitched on them."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Pixels a side, where the file does not say.")
    ] = None,
    name: Annotated[str, typer.Option(help="How requests call the model.")] = "imported",
    labels: Annotated[Path | None, typer.Option(help="A label a line.")] = None,
    licence: Annotated[str, typer.Option(help="Of the weights.")] = "not stated",
    mean: Annotated[
        str | None,
        typer.Option(
            help="Subtracted from pixels in 0..1, a number a channel, as in 0.5,0.5,0.5; default: "
            "ImageNet's, 0.5 for grey pictures."
        ),
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="Pixels are divided by it afterwards; as `--mean`.")
    ] = None,
) -> None:
    """Make a bundle from published or own checkpoints: stitched families, or DeiT, ViT, Swin and
    ResNet in timm's or Hugging Face's layout, which become the anchors of a new family.

    Nothing that a file may hold besides weights is run. Every tensor must fit, or is named.
    """
    from ladderstitch.importers.import_bundle import Naming, import_anchors, import_released

    with user_errors():
        naming = Naming(name, licence, labels, _numbers("mean", mean), _numbers("std", std))
        if family is None:
            model = import_anchors(checkpoints, images, naming, into, image_size=image_size)
        elif len(checkpoints) == 1:
            model = import_released(family, checkpoints[0], config, naming, into)
        else:
            raise ConfigError(f"checkpoints: expected one of a {family}, got {len(checkpoints)}")
    count = sum(stitch.usable for stitch in model.stitches)
    out.print(f"{into}: {count} networks; next: ladderstitch calibrate {into} --data FOLDER")


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option}: expected numbers such as 0.5,0.5,0.5, got {text}") from None


def convert_ladder(
    source: Annotated[str, typer.Argument(help="Bundle directory or fetched model, e.g. smollm2.")],
    recipe: Annotated[Path, typer.Option(help="YAML file: layers, rank, tokens, schedule.")],
    text: Annotated[Path, typer.Option(help="Text file to train on.")],
    held_out: Annotated[
        list[str],
        typer.Option(help="NAME=FILE to measure on; the first gives the bundle's qualities."),
    ],
    into: Annotated[Path, typer.Option(help="The new bundle's directory.")],
    work: Annotated[
        Path | None, typer.Option(help="Checkpoints and intermediate data; default: beside it.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write what was measured here.")] = None,
) -> None:
    """Turn the upper layers of a language model into ladder layers and retrain them.

    A ladder layer reads the stream one sub-block late, so that ranks communicate while they
    compute. Low-rank additions learn from the standard model's own predictions; the result serves
    both ways, chosen per request. Stopped, it goes on where it was.

    Example: `ladderstitch convert-ladder smollm2 --recipe examples/smollm2-ladder/ladder-8.yaml
    --text data/brown/train.txt --held-out brown=data/brown/heldout.txt --into smollm2-ladder`
    """
    from ladderstitch.text.bundle import TextBundle
    from ladderstitch.training.text.convert import Conversion, convert, write_report
    from ladderstitch.training.text.distil import LadderRecipe

    with user_errors():
        conversion = Conversion(
            source=TextBundle.load(find_bundle(source)),
            recipe=LadderRecipe.load(recipe),
            text=text,
            held_out=dict(_named(entry) for entry in held_out),
            into=into,
            work=work or into.with_name(into.name + ".work"),
        )
        with progress_bar() as progress:
            found = convert(conversion, progress)
        if report is not None:
            write_report(found, report)
        _print(found)
        err.print(f"ladderstitch serve --model {into}", highlight=False)


def train_language(
    recipe: Annotated[Path, typer.Option(help="YAML file: sizes, residual schemes, schedule.")],
    text: Annotated[list[Path], typer.Option(help="Text files to train on.")],
    held_out: Annotated[list[Path], typer.Option(help="Text files to measure on.")],
    run: Annotated[Path, typer.Option(help="Where checkpoints, logs and bundles go.")],
) -> None:
    """Train a small language model from scratch once for each residual scheme, side by side.

    Same text, same seed, same batches: the held-out losses say what the scheme costs. Writes a
    bundle for each, a plot and `pair.json`; stopped, it goes on where it was.

    Example: `ladderstitch train-language --recipe examples/small-pair/pair.yaml --text
    data/brown/train.txt --held-out data/brown/heldout.txt --run runs/small-pair`
    """
    from ladderstitch.training.text.compare_schemes import Comparison, compare
    from ladderstitch.training.text.scratch import ScratchRecipe

    with user_errors():
        comparison = Comparison(ScratchRecipe.load(recipe), text, held_out, run)
        with progress_bar() as progress:
            found = compare(comparison, progress)
        out.print_json(data={name: found[name] for name in ("parameters", "held_out_loss")})


def _named(entry: str) -> tuple[str, Path]:
    name, found, file = entry.partition("=")
    if not found or not name:
        raise ConfigError(f"held-out: expected NAME=FILE, got {entry!r}")
    return name, Path(file)


def _print(found: dict[str, object]) -> None:
    table = Table("data", "path", "next-token accuracy", "perplexity")
    measured = found["paths"]
    assert isinstance(measured, dict)
    for data, paths in measured.items():
        for path, quality in paths.items():
            table.add_row(data, path, f"{quality['value']:.4f}", f"{quality['perplexity']:.1f}")
    out.print(table)


def register(app: typer.Typer) -> None:
    group = "Make a family"
    app.command(rich_help_panel=group)(fetch)
    app.command(rich_help_panel=group)(train)
    app.command(rich_help_panel=group)(stitch)
    app.command("import", rich_help_panel=group)(import_)
    app.command("convert-ladder", rich_help_panel=group)(convert_ladder)
    app.command("train-language", rich_help_panel=group)(train_language)

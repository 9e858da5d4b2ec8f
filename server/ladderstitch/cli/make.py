"""The commands that make a model: fetch, quantise, add an adapter, convert, and train texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ladderstitch.bundles import find_bundle, is_language_bundle, models_home
from ladderstitch.cli.bundle_records import print_bundle, quality_records
from ladderstitch.cli.console import Json, err, out, progress_bar, user_errors
from ladderstitch.cli.measure import QUALITY_COLUMNS
from ladderstitch.cli.output import Column, Record, print_json, print_records
from ladderstitch.errors import ConfigError

DATA = ("fashion-mnist", "brown", "austen")
MODELS = ("smollm2", "smollm2-ladder", "efficientnet-lite")


def fetch(
    what: Annotated[
        str,
        typer.Argument(help=f"Data set ({', '.join(DATA)}) or model ({', '.join(MODELS)})."),
    ],
    into: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write (default: data/NAME for data, the folder of models otherwise)."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Download a data set that a recipe names, or a model.

    No root access is needed.
    """
    from ladderstitch.importers.fetch import fetch_data, fetch_model
    from ladderstitch.importers.fetch_efficientnet import fetch_efficientnet

    with user_errors():
        if what not in (*DATA, *MODELS):
            names = ", ".join((*DATA, *MODELS))
            raise ConfigError(f"what: expected one of {names}, got {what!r}")
        folder = into or (Path("data") if what in DATA else models_home()) / what
        num_correct: dict[int, int] = {}
        if what == "efficientnet-lite":
            with progress_bar() as progress:
                num_correct = fetch_efficientnet(folder, progress)
        elif what in MODELS:
            with progress_bar() as progress:
                task = progress.add_task(f"importing {what}", total=None)
                fetch_model(
                    what,
                    folder,
                    lambda done, all_: progress.update(task, completed=done, total=all_),
                )
        else:
            fetch_data(what, folder)
    if as_json:
        correct = [{"variant": stitch, "correct": n} for stitch, n in num_correct.items()]
        kind = "data" if what in DATA else "model"
        print_json({"name": what, "kind": kind, "folder": str(folder), "photographs": correct})
        return
    if num_correct:
        listed = ", ".join(f"{stitch}: {count}" for stitch, count in num_correct.items())
        out.print(f"correct of 20 labelled photographs, by stitch: {listed}")
    following = "" if what in DATA else f"; next: ladderstitch serve --model {into or what}"
    out.print(f"fetched {what} to {folder}{following}")


def quantize(
    bundle: Annotated[str, typer.Argument(help="Directory of a bundle, or name of a model.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Image models: folder of images, whose labels are not used, CSV file of "
            "path,label, or folder of gzipped IDX files."
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Image models: split of IDX files to take images from.")
    ] = "train",
    images: Annotated[
        int, typer.Option(min=1, help="Image models: images that the ranges are measured on.")
    ] = 256,
    text: Annotated[
        Path | None, typer.Option(help="Language models: held-out text to measure all paths on.")
    ] = None,
    precision: Annotated[
        Literal["int4", "int8"],
        typer.Option(help="Language models: number format; image models have int8 only."),
    ] = "int4",
    as_json: Json = False,
) -> None:
    """Add low-bit forms of all variants of a bundle.

    They are further variants. Image models: weights and the inputs of products get 8 bits; the
    ranges of activations are measured on images of the data. The new variants have the ids after
    the present ones. `calibrate` measures their quality, and the frontier contains those of them
    that are worth it.

    Language models: weights get 4 or 8 bits when the model is loaded, and activations 8. All paths
    are measured on the text.

    Example: `ladderstitch quantize smollm2 --text data/brown/heldout.txt`
    """
    with user_errors():
        path = find_bundle(bundle)
        if is_language_bundle(path):
            if text is None:
                raise ConfigError("text: expected a held-out text for a language model, got none")
            _quantize_language(path, precision, text, as_json=as_json)
            err.print(f"wrote {path}; next: ladderstitch serve --model {bundle}")
        else:
            if data is None:
                raise ConfigError("data: expected a folder of images for an image model, got none")
            folder = _quantize_vision(path, data, split, images)
            if as_json:
                print_bundle(path, written=str(folder))
            err.print(f"wrote {folder}; next: ladderstitch calibrate {bundle} --data {data}")


def _quantize_vision(path: Path, data: Path, split: str, images: int) -> Path:
    """Add the int8 variants of an image model; returns their folder."""
    from ladderstitch.training.vision.dataset import is_idx_folder, load_idx_folder, normalise
    from ladderstitch.training.vision.image_files import load_sample
    from ladderstitch.training.vision.quantize import quantize as run
    from ladderstitch.vision.bundle import VisionBundle

    with progress_bar() as progress:
        loaded = VisionBundle.load(path)
        inputs = loaded.manifest.preprocessing
        if is_idx_folder(data):
            shape = (inputs.channels, inputs.height, inputs.width)
            labelled = load_idx_folder(data, split, shape, len(loaded.manifest.labels))
            pixels = labelled.pixels[:images]
        else:
            pixels = load_sample(data, images, inputs, seed=0)
        task = progress.add_task("quantize", total=None)
        run(
            loaded,
            normalise(pixels, inputs.mean, inputs.std).numpy(),
            lambda done, all_: progress.update(task, completed=done, total=all_),
        )
    return loaded.int8_folder


def _quantize_language(
    path: Path, precision: Literal["int4", "int8"], text: Path, *, as_json: bool
) -> None:
    from ladderstitch.text.bundle import TextBundle
    from ladderstitch.training.text.calibrate import DEFAULT_SAMPLE, quantise

    bundle = TextBundle.load(path, calibrated=False)
    with progress_bar() as progress:
        table = quantise(bundle, precision, text, DEFAULT_SAMPLE, 1, progress)
    names = [variant.name for variant in TextBundle.load(path).manifest.variants]
    _print_measured(path, quality_records(names, table), as_json=as_json)


def _print_measured(path: Path, records: list[Record], *, as_json: bool) -> None:
    if as_json:
        print_json({"bundle": str(path), "variants": records})
    else:
        print_records(records, QUALITY_COLUMNS)


def add_adapter(
    model: Annotated[str, typer.Argument(help="Name or folder of a language model.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of a PEFT adapter (LoRA).")],
    text: Annotated[
        Path | None,
        typer.Option(
            help="Held-out text to measure all paths on (default: they are not measured)."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the path (default: that of the folder).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Add a LoRA adapter to a language model as a path.

    OpenAI requests name it as their `model`, others by `variant_id` (`--variant` of `generate`).

    Example: `ladderstitch add-adapter ./my-llama ./my-adapter`
    """
    from ladderstitch.text.bundle import TextBundle
    from ladderstitch.training.text.adapters import add_adapter as run
    from ladderstitch.training.text.calibrate import DEFAULT_SAMPLE

    with user_errors():
        path, name = find_bundle(model), name or adapter.resolve().name
        bundle = TextBundle.load(path, calibrated=False)
        with progress_bar() as progress:
            table = run(bundle, adapter, name, text, DEFAULT_SAMPLE, progress)
        names = [variant.name for variant in TextBundle.load(path).manifest.variants]
        if table is not None:
            _print_measured(path, quality_records(names, table), as_json=as_json)
        err.print(
            f"wrote {path}; next: ladderstitch serve --model {model} --http-port 8081; requests "
            f'name "{name}" as their model, or variant {len(names) - 1}',
            highlight=False,
        )


def convert_ladder(
    source: Annotated[
        str, typer.Argument(help="Directory of a bundle, or name of a fetched model, e.g. smollm2.")
    ],
    recipe: Annotated[Path, typer.Option(help="YAML file with layers, rank, tokens and schedule.")],
    text: Annotated[Path, typer.Option(help="Text file to train on.")],
    held_out: Annotated[
        list[str],
        typer.Option(
            help="NAME=FILE of a held-out text; the first gives the qualities of the bundle."
        ),
    ],
    into: Annotated[Path, typer.Option(help="Directory of the new bundle.")],
    work: Annotated[
        Path | None,
        typer.Option(help="Folder of checkpoints and intermediate data (default: INTO.work)."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="File to write the measurements to.")] = None,
    as_json: Json = False,
) -> None:
    """Convert a language model to ladder layers or groups.

    They are retrained. A ladder layer reads the residual stream one sub-block late, so that ranks
    communicate while they compute. Layers of a group read one input and share their reductions.
    Low-rank updates of the weights are trained on the predictions of the standard model. The new
    bundle has both variants, chosen per request. Resumes if it was interrupted.

    Example: `ladderstitch convert-ladder smollm2 --recipe examples/smollm2-ladder/ladder-8.yaml
    --text data/brown/train.txt --held-out brown=data/brown/heldout.txt --into smollm2-ladder`
    """
    from ladderstitch.text.bundle import TextBundle
    from ladderstitch.training.text.convert import Conversion, convert, write_report
    from ladderstitch.training.text.distil import ConversionRecipe

    with user_errors():
        conversion = Conversion(
            source=TextBundle.load(find_bundle(source)),
            recipe=ConversionRecipe.load(recipe),
            text=text,
            held_out=dict(_parse_named_file(entry) for entry in held_out),
            into=into,
            work=work or into.with_name(into.name + ".work"),
        )
        with progress_bar() as progress:
            found = convert(conversion, progress)
        if report is not None:
            write_report(found, report)
        _print_qualities(into, found, as_json=as_json)
        err.print(f"ladderstitch serve --model {into}", highlight=False)


def train_language(
    recipe: Annotated[
        Path, typer.Option(help="YAML file with sizes, residual schemes and schedule.")
    ],
    text: Annotated[list[Path], typer.Option(help="Text files to train on.")],
    held_out: Annotated[list[Path], typer.Option(help="Held-out text files.")],
    run: Annotated[Path, typer.Option(help="Folder for checkpoints, logs and bundles.")],
    as_json: Json = False,
) -> None:
    """Train small language models to compare schemes.

    One is trained from scratch with each residual scheme. Text, seed and batches are the same, so
    that the held-out losses show the cost of the scheme. Writes a bundle for each scheme, a plot
    and `pair.json`. Resumes if it was interrupted.

    Example: `ladderstitch train-language --recipe examples/small-pair/pair.yaml --text
    data/brown/train.txt --held-out data/brown/heldout.txt --run runs/small-pair`
    """
    from ladderstitch.training.text.compare_schemes import SchemeComparison, compare_schemes
    from ladderstitch.training.text.scratch import ScratchRecipe

    with user_errors():
        comparison = SchemeComparison(ScratchRecipe.load(recipe), text, held_out, run)
        with progress_bar() as progress:
            found = compare_schemes(comparison, progress)
    losses = found["held_out_loss"]
    assert isinstance(losses, dict)
    if as_json:
        print_json({"parameters": found["parameters"], "held_out_loss": losses})
    else:
        records = [{"name": scheme, "held_out_loss": loss} for scheme, loss in losses.items()]
        print_records(records, SCHEME_COLUMNS, title=f"{found['parameters']} parameters")


def _parse_named_file(entry: str) -> tuple[str, Path]:
    name, found, file = entry.partition("=")
    if not found or not name:
        raise ConfigError(f"held-out: expected NAME=FILE, got {entry!r}")
    return name, Path(file)


def _print_qualities(into: Path, found: dict[str, object], *, as_json: bool) -> None:
    measured = found["paths"]
    assert isinstance(measured, dict)
    records = [
        {
            "data": data,
            "name": path,
            "quality": quality["value"],
            "perplexity": quality["perplexity"],
        }
        for data, paths in measured.items()
        for path, quality in paths.items()
    ]
    if as_json:
        print_json({"bundle": str(into), "variants": records})
    else:
        print_records(records, LADDER_COLUMNS)


LADDER_COLUMNS = (
    Column("data", lambda r: str(r["data"]), text=True),
    Column("variant", lambda r: str(r["name"]), text=True),
    Column("next-token accuracy", lambda r: f"{r['quality']:.4f}"),
    Column("perplexity", lambda r: f"{r['perplexity']:.1f}"),
)
SCHEME_COLUMNS = (
    Column("scheme", lambda r: str(r["name"]), text=True),
    Column("held-out loss, nats", lambda r: f"{r['held_out_loss']:.4f}"),
)

"""The command `convert-ladder`, which retrains a language model for another scheme."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ladderstitch.bundles import find_bundle
from ladderstitch.cli.console import Json, err, progress_bar, user_errors
from ladderstitch.cli.output import Column, print_json, print_records
from ladderstitch.errors import ConfigError


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

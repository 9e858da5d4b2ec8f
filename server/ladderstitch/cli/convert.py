"""Commands that make language models: ladders of standard ones, and small ones from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ladderstitch.bundles.registry import find_bundle
from ladderstitch.cli.console import err, out, progress_bar, user_errors
from ladderstitch.errors import ConfigError


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
    from ladderstitch.text.bundle import LanguageBundle
    from ladderstitch.training.text.convert import Conversion, convert, write_report
    from ladderstitch.training.text.recipe import LadderRecipe

    with user_errors():
        conversion = Conversion(
            source=LanguageBundle.load(find_bundle(source)),
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
    app.command("convert-ladder", rich_help_panel="Make a family")(convert_ladder)
    app.command("train-language", rich_help_panel="Make a family")(train_language)

"""The command `add-adapter`, which adds a LoRA adapter to a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ladderstitch.bundles import find_bundle
from ladderstitch.cli.bundle_records import quality_records
from ladderstitch.cli.console import Json, err, progress_bar, user_errors
from ladderstitch.cli.measure import print_measured


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
            print_measured(path, quality_records(names, table), as_json=as_json)
        err.print(
            f"wrote {path}; next: ladderstitch serve --model {model} --http-port 8081; requests "
            f'name "{name}" as their model, or variant {len(names) - 1}',
            highlight=False,
        )

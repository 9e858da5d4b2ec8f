"""`ladderstitch-loadtest generation`: a language model shared by many callers."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ladderstitch.bundles import find_bundle
from ladderstitch.cli.console import err, out
from ladderstitch.text.bundle import TextBundle
from ladderstitch_loadtest.servers.results_io import write

RATES = "0.5,1,1.5,2,3,4,6,8"


def generation(
    text: Annotated[Path, typer.Option(help="Text file that prompts are cut from.")],
    model: Annotated[str, typer.Option(help="Bundle of a language model.")] = "smollm2",
    family: Annotated[
        str | None,
        typer.Option(help="Bundle with several paths, e.g. smollm2-ladder; default: skip that."),
    ] = None,
    rates: Annotated[str, typer.Option(help="Requests/s to offer, rising.")] = RATES,
    seconds: Annotated[float, typer.Option(help="Length of each run.")] = 20.0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    transformers: Annotated[
        bool, typer.Option(help="Also beside the continuous batching of `transformers`.")
    ] = True,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for NAME.json.")] = None,
) -> None:
    """Batching under open-loop load with token budgets, prefix reuse, paths by budget.

    Needs `ladderstitch fetch smollm2` and a text. About 10 minutes.
    """
    from ladderstitch_loadtest.benchmarks import generation_load, generation_parts

    bundle = TextBundle.load(find_bundle(model))
    found: dict[str, Any] = {}
    parts: dict[str, Coroutine[Any, Any, dict[str, object]]] = {
        "prefix": generation_parts.prefix_reuse(bundle, dtype),
    }
    if family is not None:
        several = TextBundle.load(find_bundle(family))
        parts["paths"] = generation_parts.paths_by_budget(several, 1e-3, dtype)
    parts["batching"] = generation_load.compare_batching(
        bundle,
        text.read_text(),
        [float(rate) for rate in rates.split(",")],
        seconds,
        dtype,
        lambda row: err.print(row),
    )
    with tempfile.TemporaryDirectory() as packages:
        if transformers:
            from ladderstitch.importers.fetch import download
            from ladderstitch_loadtest.benchmarks.language_checks import reference_model

            torch.set_num_threads(1)
            reference = reference_model(download("smollm2", Path(packages)))
            parts["transformers"] = generation_parts.beside_transformers(
                bundle, reference, "float32"
            )
        for name, part in parts.items():
            err.print(f"{name} ...")
            found[name] = asyncio.run(part)
    out.print_json(json.dumps(found))
    write(folder, "generation", found)
    if folder is not None:
        generation_load.plot(found["batching"], folder / "generation.png")

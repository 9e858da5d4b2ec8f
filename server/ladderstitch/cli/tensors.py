"""Outputs that are tensors on the command line: a table of their ranges, and an NPZ file."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ladderstitch.cli.console import err, plain_table
from ladderstitch.client import Prediction
from ladderstitch.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table


def tensor_table(answers: Sequence[tuple[str, Prediction]]) -> Table:
    """Return the shape, range and mean of each output of the answers, by the files' names."""
    cells = []
    for name, answer in answers:
        for output, values in answer.outputs.items():
            numbers = values.astype(np.float64)
            if numbers.size:
                ranges = [f"{f(numbers):.4g}" for f in (np.min, np.max, np.mean)]
            else:
                ranges = ["-"] * 3
            shape = "x".join(map(str, values.shape))
            total = f"{1e3 * answer.total_s:.2f} ms"
            cells.append((name, output, shape, *ranges, answer.variant_name, total))
    columns = ("input", "output", "shape", "min", "max", "mean", "variant", "total")
    return plain_table(columns, cells, text=("input", "output", "shape", "variant"))


def write_outputs(path: Path, answers: Sequence[Prediction]) -> None:
    """Write all outputs by their names to an NPZ file, joined along the first axis.

    Class scores are the output `logits`. Raises `ConfigError` if the file cannot be written.
    """
    found = [answer.outputs or {"logits": answer.logits} for answer in answers]
    joined = {name: np.concatenate([outputs[name] for outputs in found]) for name in found[0]}
    try:
        with zipfile.ZipFile(path, "w") as archive:  # names may be those of np.savez's parameters
            for name, values in joined.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.save(file, values, allow_pickle=False)
    except OSError as error:
        raise ConfigError(f"output: {error}") from error
    err.print(f"wrote {path}", soft_wrap=True)

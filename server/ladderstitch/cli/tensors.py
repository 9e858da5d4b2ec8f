"""Outputs that are tensors on the command line: a table of their ranges, and an NPZ file."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ladderstitch.cli.console import err
from ladderstitch.cli.output import Column, Record
from ladderstitch.cli.predict import cost_fields, show_budget, show_total
from ladderstitch.errors import ConfigError

if TYPE_CHECKING:
    from ladderstitch.client import Prediction


def tensor_records(answers: Sequence[tuple[str, Prediction]]) -> list[Record]:
    """Return a record of each output of the answers, by the files' names."""
    records: list[Record] = []
    for name, answer in answers:
        for output, values in answer.outputs.items():
            numbers = values.astype(np.float64)
            ranges = {
                key: float(measure(numbers)) if numbers.size else None
                for key, measure in (("min", np.min), ("max", np.max), ("mean", np.mean))
            }
            own = {"file": name, "output": output, "shape": list(values.shape)}
            records.append(own | ranges | cost_fields(answer))
    return records


def _show_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


TENSOR_COLUMNS = (
    Column("input", lambda r: str(r["file"]), text=True),
    Column("output", lambda r: str(r["output"]), text=True),
    Column("shape", lambda r: "x".join(map(str, r["shape"])), text=True),
    Column("min", lambda r: _show_number(r["min"])),
    Column("max", lambda r: _show_number(r["max"])),
    Column("mean", lambda r: _show_number(r["mean"]), drop=3),
    Column("variant", lambda r: str(r["variant_name"]), text=True, drop=2),
    Column("total", show_total, drop=1),
    Column("budget", show_budget, drop=1),
)


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

"""The three forms of a command's data: a table, tab-separated fields in a pipe, or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from ladderstitch.cli.console import err, out, plain_table

if TYPE_CHECKING:
    from rich.table import Table

MOST_DECIMALS = 8
"""Decimals of milliseconds that times get at most to look different."""
UNLIMITED = 100_000
"""A width that no table reaches."""
Record = Mapping[str, Any]
"""One row: its fields by the names that JSON and tab-separated output have."""


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun, such as `1 rank` or `2 ranks`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table on a terminal."""

    heading: str
    show: Callable[[Record], str | Text]
    """Returns the cell of a record."""
    text: bool = False
    """Whether cells are texts, which may be shortened, instead of numbers."""
    drop: int = 0
    """Columns of the highest number are left out first where the terminal is too narrow; 0: none
    is left out."""


def print_records(
    records: Sequence[Record], columns: Sequence[Column], *, title: str = "", note: str = ""
) -> None:
    """Print records as a table with a title and a note, or tab-separated if it is not a terminal.

    Tab-separated output has all fields under their names in the first line, numbers with all
    digits, nothing for None, and JSON for lists; title and note go to standard error then.
    """
    if out.is_terminal:
        if title:
            out.print(Text(title, style="bold"), soft_wrap=True)
        out.print(fit_table(records, columns))
    else:
        if title:
            err.print(title, highlight=False, markup=False, soft_wrap=True)
        print_fields(records)
    if note:
        (out if out.is_terminal else err).print(note, highlight=False, markup=False, soft_wrap=True)


def print_fields(records: Sequence[Record]) -> None:
    """Print records tab-separated, with the names of the fields in the first line."""
    if records:
        typer.echo("\t".join(records[0]))
    for record in records:
        typer.echo("\t".join(_format_field(value) for value in record.values()))


def print_json(document: object) -> None:
    """Print one JSON document; numbers that are not finite become null."""
    typer.echo(json.dumps(_finite(document), ensure_ascii=False, allow_nan=False, indent=2))


def fit_table(records: Sequence[Record], columns: Sequence[Column]) -> Table:
    """Return a table that fits the terminal, without the columns for which it is too narrow."""
    shown = list(columns)
    unlimited = out.options.update(width=UNLIMITED)
    while True:
        rows = [[column.show(record) for column in shown] for record in records]
        texts = {column.heading for column in shown if column.text}
        table = plain_table([column.heading for column in shown], rows, text=texts)
        widest = max(shown, key=lambda column: column.drop)
        if not widest.drop or out.measure(table, options=unlimited).maximum <= out.width:
            return table
        shown.remove(widest)


def format_ms(seconds: float, decimals: int = 2) -> str:
    """Return a time in milliseconds with its unit."""
    return f"{1e3 * seconds:.{decimals}f} ms"


def format_budget(seconds: float) -> str:
    """Return a budget in milliseconds with its unit, without zeros at the end."""
    return f"{1e3 * seconds:.3f}".rstrip("0").rstrip(".") + " ms"


def format_total(total_s: float, budget_s: float | None) -> str:
    """Return the time of an answer, with as many digits as make it differ from its budget."""
    for decimals in range(2, MOST_DECIMALS):
        shown = format_ms(total_s, decimals)
        if budget_s in (None, total_s) or shown != format_ms(budget_s, decimals):
            break
    return shown


def _format_field(value: object) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, str):
        return " ".join(value.splitlines()).replace("\t", " ")
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    """Return a value for JSON, with None for numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value

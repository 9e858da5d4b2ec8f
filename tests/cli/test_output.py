"""The forms of a command's data: tables that fit, tab-separated fields, JSON."""

from __future__ import annotations

import json
import math
from unittest import mock

import pytest
from rich.console import Console

from ladderstitch.cli import output
from ladderstitch.cli.output import Column, print_json, print_records
from ladderstitch.cli.predict import ANSWER_COLUMNS, show_budget, show_total

RECORDS = [
    {"file": "a-picture-of-a-cat.png", "share": 0.5, "met": None, "shape": [1, 2]},
    {"file": "tab\tand\nline.png", "share": math.nan, "met": True, "shape": []},
]
COLUMNS = (
    Column("file", lambda r: str(r["file"]), text=True),
    Column("share", lambda r: f"{r['share']:.3f}"),
    Column("met", lambda r: str(r["met"]), drop=1),
    Column("shape", lambda r: str(r["shape"]), drop=2),
)


def print_at(width: int, records: list[dict[str, object]], columns: tuple[Column, ...]) -> str:
    """Return what a terminal of some width shows."""
    terminal = Console(width=width, force_terminal=True, color_system=None)
    with mock.patch.object(output, "out", terminal), terminal.capture() as capture:
        print_records(records, columns, title="a title", note="a note")
    return capture.get()


def test_pipe_gets_fields_with_tabs(capsys: pytest.CaptureFixture[str]) -> None:
    print_records(RECORDS, COLUMNS, title="a title", note="a note")
    printed = capsys.readouterr()
    assert printed.out == (
        "file\tshare\tmet\tshape\n"
        "a-picture-of-a-cat.png\t0.5\t\t[1, 2]\n"
        "tab and line.png\t\ttrue\t[]\n"
    )
    assert printed.err == "a title\na note\n"


def test_json_is_one_document_with_null_for_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"records": RECORDS, "by": {3: math.inf}})
    read = json.loads(capsys.readouterr().out)
    assert read["records"][1] == {**RECORDS[1], "share": None}
    assert read["by"] == {"3": None}


@pytest.mark.parametrize(
    ("width", "headings"),
    [
        (80, ["file", "share", "met", "shape"]),
        (34, ["file", "share", "met"]),
        (29, ["file", "share"]),
    ],
)
def test_narrow_terminal_drops_columns_and_no_text(width: int, headings: list[str]) -> None:
    lines = print_at(width, RECORDS[:1], COLUMNS).splitlines()
    assert lines[0] == "a title"
    assert lines[1].split() == headings
    assert lines[2].startswith("a-picture-of-a-cat.png")
    assert max(map(len, lines)) <= width
    assert lines[-1] == "a note"


def answer_record(**changes: object) -> dict[str, object]:
    """Return the record of an answer with long names."""
    record = {
        "file": "t-shirt-top-19.png",
        "label": "t-shirt/top",
        "probability": 0.961,
        "variant": 21,
        "variant_name": "anchor-7-int8",
        "quality": 0.9482,
        "queue_s": 0.00017,
        "compute_s": 0.00067,
        "total_s": 0.00099,
        "budget_s": 0.005,
        "budget_met": True,
    }
    return record | changes


def test_answers_fit_80_columns_with_full_names() -> None:
    printed = print_at(80, [answer_record(budget_met=False, total_s=0.0123)], ANSWER_COLUMNS)
    assert "…" not in printed
    for part in ("t-shirt-top-19.png", "t-shirt/top", "anchor-7-int8", "0.9482", "5 ms missed"):
        assert part in printed


@pytest.mark.parametrize(
    ("total_s", "budget_s", "total", "budget"),
    [
        (0.001234, None, "1.23 ms", "-"),
        (0.005003, 0.005, "5.003 ms", "5 ms missed"),
        (0.004998, 0.005, "4.998 ms", "5 ms met"),
        (0.0123456, 0.005, "12.35 ms", "5 ms missed"),
        (0.0005, 0.0008, "0.50 ms", "0.8 ms met"),
    ],
)
def test_total_and_budget_do_not_contradict_each_other(
    total_s: float, budget_s: float | None, total: str, budget: str
) -> None:
    met = None if budget_s is None else total_s <= budget_s
    record = answer_record(total_s=total_s, budget_s=budget_s, budget_met=met)
    assert show_total(record) == total
    assert show_budget(record).plain == budget

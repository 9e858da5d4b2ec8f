"""What commands share: durations, tables of 80 columns, and the token file."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from ladderstitch.cli.console import parse_duration, plain_table
from ladderstitch.cli.fetch import DATA, MODELS
from ladderstitch.client.channel import read_token
from ladderstitch.errors import ConfigError
from ladderstitch.importers import fetch, fetch_efficientnet


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("800us", 8e-4), ("5ms", 5e-3), ("0.5s", 0.5), (" 2s ", 2.0), ("0", 0.0), ("0ms", 0.0)],
)
def test_parse_duration_reads_each_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["5", "0.5", "5 ms", "-5ms", "5m", "ms", "", "1e3ms", "nan"])
def test_parse_duration_rejects_text_without_a_unit(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^announce: expected a number with a unit .*got '"):
        parse_duration(text, "announce")


def print_table(width: int, name: str) -> list[str]:
    rows = [(name, "0.123", Text("ok", style="green")), ("[red]b[/]", "12.5", "missed")]
    console = Console(width=width)
    with console.capture() as capture:
        console.print(plain_table(("image", "seconds", "state"), rows, text=("image", "state")))
    return capture.get().splitlines()


def test_plain_table_shortens_text_and_never_a_number() -> None:
    lines = print_table(40, "a-very-long-name-of-a-picture-" * 3 + ".png")
    assert len(lines) == 3
    assert all(len(line) <= 40 for line in lines)
    assert "…" in lines[1]
    assert "0.123" in lines[1]
    assert "12.5" in lines[2]


def test_plain_table_prints_brackets_as_they_are() -> None:
    assert print_table(80, "a")[2].startswith("[red]b[/]")


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"two words", b"a\nb", b"caf\xc3\xa9", b"\xff\xfe"]
)
def test_read_token_rejects_a_file_without_one_token(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="token_file: expected one bearer token"):
        read_token(path)


def test_read_token_strips_white_space(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("  secret-0123456789==\n")
    assert read_token(path) == "secret-0123456789=="


def test_fetch_lists_every_model_and_data_set() -> None:
    assert set(DATA) == set(fetch.DATA_SETS)
    assert set(MODELS) == {*fetch.MODELS, fetch_efficientnet.NAME}

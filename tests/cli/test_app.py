"""The command line as a whole: its commands, their help, and what is imported for them."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module

import pytest
from typer.testing import CliRunner

from ladderstitch.cli import app
from ladderstitch.cli.app import COMMANDS, ENTRIES, Entry

HEAVY = ("torch", "ray", "onnxruntime", "fastapi", "transformers", "matplotlib")
WITHOUT_NUMPY = ("health", "predict", "models", "schedule", "generate", "load", "drain")
"""Commands whose help page needs neither numpy nor grpc."""


def test_help_lists_every_command_once() -> None:
    done = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"})
    assert done.exit_code == 0
    assert len(COMMANDS) == len(ENTRIES) > 25
    for name in COMMANDS:
        assert f"│ {name} " in done.stdout
    assert "3 a budget was missed" in " ".join(done.stdout.split())


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_summary_is_the_first_line_of_the_command(entry: Entry) -> None:
    module = import_module(f"ladderstitch.cli.{entry.module}")
    documentation = inspect.getdoc(getattr(module, entry.function))
    assert documentation is not None
    assert documentation.partition("\n")[0] == entry.summary


@pytest.mark.parametrize("name", COMMANDS)
def test_command_help_shows_its_usage(name: str) -> None:
    done = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    assert f"{name} [OPTIONS]" in done.stdout
    assert "Exit codes: 0 success" in done.stdout


def test_unknown_command_is_named_in_the_error() -> None:
    done = CliRunner().invoke(app, ["serv"])
    assert done.exit_code == 2
    assert "No such command 'serv'" in done.output


def imported_for(*commands: list[str]) -> set[str]:
    """Return the packages that a process imports for command lines that end at once."""
    code = (
        "import sys\n"
        "from ladderstitch.cli import app\n"
        f"for arguments in {commands!r}:\n"
        "    try:\n"
        "        app(arguments)\n"
        "    except SystemExit as end:\n"
        "        assert end.code in (0, 1, 2), (arguments, end.code)\n"
        "print('|'.join(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {module.partition(".")[0] for module in done.stderr.splitlines()[-1].split("|")}


def test_help_of_no_command_imports_torch() -> None:
    imported = imported_for(["--help"], *([name, "--help"] for name in COMMANDS))
    assert "typer" in imported
    assert imported.isdisjoint(HEAVY)


def test_help_of_clients_imports_neither_numpy_nor_grpc() -> None:
    imported = imported_for(["--help"], *([name, "--help"] for name in WITHOUT_NUMPY))
    assert imported.isdisjoint({*HEAVY, "numpy", "grpc"})


def test_help_of_serve_imports_neither_yaml_nor_asyncio() -> None:
    imported = imported_for(["serve", "--help"])
    assert "pydantic" in imported  # its options are the fields of a model
    assert imported.isdisjoint({"yaml", "asyncio", "numpy", "grpc"})


def test_commands_that_call_a_server_import_no_torch() -> None:
    address = ["--address", "127.0.0.1:9"]  # where no server is
    imported = imported_for(
        ["health", *address], ["models", *address], ["predict", __file__, *address]
    )
    assert "grpc" in imported
    assert imported.isdisjoint(HEAVY)

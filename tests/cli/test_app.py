"""The command line as a whole: its commands and their help, and the imports of light modules."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ladderstitch.cli import app
from ladderstitch.cli.app import LIGHT, MODULES, commands_of

COMMANDS = [name for module in MODULES for name in commands_of(module)]


def test_help_lists_every_command_once() -> None:
    done = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"})
    assert done.exit_code == 0
    assert len(set(COMMANDS)) == len(COMMANDS) > 15
    for name in COMMANDS:
        assert f"│ {name} " in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_command_help_shows_its_usage(name: str) -> None:
    done = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    assert f"{name} [OPTIONS]" in done.stdout


def test_unknown_command_is_named_in_the_error() -> None:
    done = CliRunner().invoke(app, ["serv"])
    assert done.exit_code == 2
    assert "No such command 'serv'" in done.output


@pytest.mark.parametrize("module", LIGHT)
def test_light_module_imports_neither_torch_nor_ray(module: str) -> None:
    code = (
        "import sys; from ladderstitch.cli.app import commands_of; "
        f"commands_of({module!r}); sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

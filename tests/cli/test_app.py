"""The command line as a whole: every command is found, and the light ones stay light."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ladderstitch.cli import app
from ladderstitch.cli.app import LIGHT, MODULES, commands_of

ALL = [name for module in MODULES for name in commands_of(module)]


def test_the_help_page_lists_every_command_once() -> None:
    done = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"})
    assert done.exit_code == 0
    assert len(set(ALL)) == len(ALL) > 15
    for name in ALL:
        assert f"│ {name} " in done.stdout


@pytest.mark.parametrize("name", ALL)
def test_every_command_explains_itself(name: str) -> None:
    done = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    assert f"{name} [OPTIONS]" in done.stdout


def test_an_unknown_command_is_named() -> None:
    done = CliRunner().invoke(app, ["serv"])
    assert done.exit_code == 2
    assert "No such command 'serv'" in done.output


@pytest.mark.parametrize("module", LIGHT)
def test_light_commands_do_without_torch(module: str) -> None:
    code = (
        "import sys; from ladderstitch.cli.app import commands_of; "
        f"commands_of({module!r}); sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""The example configuration shows every field with its default."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from ladderstitch.cli.options import with_config_options
from ladderstitch.config import ServerConfig
from ladderstitch.errors import ConfigError

EXAMPLE = Path(__file__).parent.parent / "examples" / "serve.yaml"


def test_example_config_shows_every_field_with_its_default() -> None:
    assert ServerConfig.load(EXAMPLE) == ServerConfig()
    shown = yaml.safe_load(EXAMPLE.read_text())
    hidden = {"bundle"}  # a path of the installation
    assert shown.keys() == ServerConfig.model_fields.keys() - hidden
    scheduling = type(ServerConfig().scheduling).model_fields.keys()
    assert shown["scheduling"].keys() == scheduling
    command = [sys.executable, "scripts/example_config.py", "--check"]
    assert subprocess.run(command, cwd=EXAMPLE.parents[1]).returncode == 0, "run make manifests"


@pytest.mark.parametrize(("given", "threads"), [("auto", "auto"), ("3", 3), (2, 2)])
def test_threads_is_a_number_or_auto(given: str | int, threads: str | int) -> None:
    assert ServerConfig.load(None, {"threads": given}).threads == threads


@pytest.mark.parametrize("given", [0, -1, "none", 1.5])
def test_threads_other_value_raises(given: object) -> None:
    with pytest.raises(ConfigError, match="threads"):
        ServerConfig.load(None, {"threads": given})


@pytest.mark.parametrize(("argument", "threads"), [("auto", "auto"), ("4", 4)])
def test_option_threads_is_read(argument: str, threads: str | int) -> None:
    found: list[ServerConfig] = []

    @with_config_options(ServerConfig, skip=("bundle",))
    def command(given: dict[str, Any]) -> None:
        found.append(ServerConfig.load(None, given))

    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, ["--threads", argument])
    assert done.exit_code == 0, done.output
    assert found[0].threads == threads

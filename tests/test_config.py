"""The example configuration shows every field with its default."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from ladderstitch.config import ServerConfig

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

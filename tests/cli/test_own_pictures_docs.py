"""The commands of docs/own-models.md for pictures of one's own, run as they are printed."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from ladderstitch.cli import app
from ladderstitch.vision.bundle import VisionBundle
from tests.support.coloured_pictures import RECIPE, write_pictures

PAGE = (Path(__file__).parents[2] / "docs" / "own-models.md").read_text()
SECTION = PAGE[PAGE.index("## Your own pictures") :].partition("\n## ")[0]
CLIENTS = ("serve", "predict")
"""Commands that need a server; another test runs them."""


def test_commands_for_pictures_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "photos", 3)
    write_pictures(tmp_path / "unlabelled", 3, names={"red": ".", "blue": "."}, seed=1)
    recipe = copy.deepcopy(RECIPE)
    for anchor in recipe["family"]["anchors"]:
        anchor["stem"] = "large"  # for images of 96 pixels
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    blocks = re.findall(r"```sh\n(.*?)```", SECTION, re.S)
    commands = [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]
    assert len(commands) == 8
    for command in commands:
        if command[0] not in CLIENTS:
            result = CliRunner().invoke(app, command)
            assert result.exit_code == 0, result.output
    mine = VisionBundle.load(tmp_path / "bundles" / "mine")
    assert mine.manifest.name == "mine"
    assert mine.manifest.labels == ("blue", "green", "red")
    assert mine.quality is not None
    steps, unlabelled = (
        VisionBundle.load(tmp_path / "bundles" / n) for n in ("steps", "unlabelled")
    )
    assert steps.manifest.preprocessing.height == unlabelled.manifest.preprocessing.height == 96
    assert steps.manifest.precisions == ("float32", "int8")

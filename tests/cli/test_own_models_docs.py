"""The commands of docs/own-models.md for language models, run as they are printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ladderstitch.bundles import HOME_VARIABLE
from ladderstitch.cli import app
from tests.support.hugging_face_folders import write_folder, write_llama
from tests.text.hugging_face.test_adapters import write_adapter

PAGE = (Path(__file__).parents[2] / "docs" / "own-models.md").read_text()
SECTION = PAGE[PAGE.index("## Language models") :].partition("\n## ")[0]
COMMANDS = [
    command
    for block in re.findall(r"```sh\n(.*?)```", PAGE[: len(SECTION) + PAGE.index(SECTION)], re.S)
    for command in block.splitlines()
    if not command.startswith(("ladderstitch serve", "ladderstitch generate"))
]


def test_commands_for_language_models_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "my-adapter", write_folder(tmp_path / "my-llama", "mistral"))
    for name, width in (("my-small", 16), ("my-large", 32)):
        write_llama(tmp_path / name, width, seed=width)
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    words = "a text that is long enough to be measured in windows of many tokens " * 20
    for name in ("train.txt", "held-out.txt"):
        (tmp_path / name).write_text(words)
    assert [shlex.split(command)[1] for command in COMMANDS] == [
        "calibrate",
        "quantize",
        "add-adapter",
        "make",
    ]
    for command in COMMANDS:
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, result.output
    manifest = (tmp_path / "my-llama" / "model.yaml").read_text()
    assert all(name in manifest for name in ("standard-int4", "my-adapter"))

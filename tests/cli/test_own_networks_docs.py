"""The code and commands of docs/own-models.md for image networks, run as they are printed."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ladderstitch.bundles import HOME_VARIABLE
from ladderstitch.cli import app
from ladderstitch.vision.bundle import VisionBundle
from tests.support.onnx_networks import write_photographs

PAGE = (Path(__file__).parents[2] / "docs" / "own-models.md").read_text()
SECTION = PAGE[PAGE.index("## Image networks") :].partition("\n## ")[0]
LABELS = ("cat", "dog")


def blocks(language: str) -> list[str]:
    """Return the blocks of code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", SECTION, re.S)


def write_folder(folder: Path, scale: int) -> None:
    """Write a network of transformers with random weights for images of 32 pixels."""
    from transformers import ConvNextConfig, ConvNextForImageClassification, ConvNextImageProcessor

    config = ConvNextConfig(
        hidden_sizes=[scale * width for width in (4, 6, 8, 8)],
        depths=[1, 1, 1, 1],
        patch_size=2,
        id2label=dict(enumerate(LABELS)),
        label2id={label: position for position, label in enumerate(LABELS)},
    )
    ConvNextForImageClassification(config).save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)


def export(folder: Path, name: str) -> None:
    """Run the code of the page on images of 32 pixels, and copy the files it names."""
    code = blocks("python")[0].replace("224, 224", "32, 32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code.replace("./my-network", str(folder)), {})
    for file in ("preprocessor_config.json", "config.json"):
        Path(f"{name}.{file}").write_bytes((folder / file).read_bytes())


def test_code_and_commands_for_networks_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    write_folder(tmp_path / "my-network", 1)
    write_folder(tmp_path / "other", 2)
    export(tmp_path / "other", "large")
    write_photographs(tmp_path / "photos", 12)
    for seed, label in enumerate(LABELS):
        write_photographs(tmp_path / "val" / label, 4, seed)
    (tmp_path / "family.yaml").write_text(blocks("yaml")[0])
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) == 9
    outputs = {}
    for command in commands:
        if not command.startswith("ladderstitch serve"):
            result = CliRunner().invoke(app, shlex.split(command)[1:])
            assert result.exit_code == 0, result.output
            outputs[command.split()[1]] = result.output
    assert "logits: [batch, 2]" in outputs["export"]
    assert "cut points: " in outputs["inspect"]
    assert "ladderstitch serve --model mine" in outputs["make"]
    made = VisionBundle.load(tmp_path / "home" / "mine")
    assert made.manifest.labels == LABELS
    assert made.manifest.preprocessing.height == 32
    assert made.quality is not None
    assert made.quality.metric == "top-1 accuracy"
    assert made.latency is not None
    assert (made.path / "frontier.png").stat().st_size > 0
    known = VisionBundle.load(tmp_path / "bundles" / "known").quality
    assert known is not None
    assert sorted(quality.value for quality in known.variants.values()) == [0.71, 0.8]

"""The code and commands of docs/own-models.md for tensors in and out, run as they are printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ladderstitch import client as client_module
from ladderstitch.bundles import HOME_VARIABLE
from ladderstitch.cli import app
from ladderstitch.vision.bundle import VisionBundle
from tests.support.onnx_networks import write_photographs
from tests.support.servers import start_server, stop_server
from tests.support.tensor_networks import (
    CLASSES,
    VIDEO,
    Segmenter,
    Video,
    random_inputs,
    write_tensor_network,
)

PAGE = (Path(__file__).parents[2] / "docs" / "own-models.md").read_text()
SECTION = PAGE[PAGE.index("## Tensors in and out") :].partition("\n## ")[0]


def blocks(language: str) -> list[str]:
    """Return the blocks of code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", SECTION, re.S)


def write_files(folder: Path) -> None:
    """Write the networks, photographs, masks and clips that the page names."""
    for name, kind, width in (
        ("masks-small", Segmenter, 4),
        ("masks", Segmenter, 8),
        ("clips-small", Video, 4),
        ("clips", Video, 8),
    ):
        write_tensor_network(folder / f"{name}.onnx", kind, width)
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    write_photographs(folder / "photos", 6)
    (folder / "masks").mkdir()
    for number, path in enumerate(sorted((folder / "photos").iterdir())):
        with Image.open(path) as image:
            size = image.size
        mask = Image.fromarray(np.full((2, 3), number % 4, np.uint8))
        mask.resize(size).save(folder / "masks" / path.name)
    (folder / "clips").mkdir()
    for number, clip in enumerate(random_inputs(8, VIDEO)):
        np.save(folder / "clips" / f"{number}.npy", clip)


def test_code_and_commands_for_tensors_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    write_files(tmp_path)
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) == 5
    server = None
    for command in commands:
        arguments = shlex.split(command)[1:]
        if arguments[0] == "serve":
            server = start_server(Path(arguments[2]), tmp_path / "log")
            continue
        if arguments[0] == "predict":
            assert server is not None
            arguments += ["--address", server.address]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert server is not None
    address = server.address
    with np.load("masks.npz") as written:
        expected = written["masks"].argmax(1)
    assert expected.shape == (1, 8, 8)
    real = client_module.Client
    monkeypatch.setattr(client_module, "Client", lambda: real(address))
    names: dict[str, np.ndarray] = {}
    exec(blocks("python")[0], names)
    np.testing.assert_array_equal(names["classes"], expected)
    assert stop_server(server) == 0
    masks, clips = (VisionBundle.load(p) for p in (Path("bundles/masks"), tmp_path / "home/clips"))
    assert masks.quality is not None
    assert clips.quality is not None
    assert (masks.quality.metric, clips.quality.metric) == ("mean IoU", "agreement with clips")

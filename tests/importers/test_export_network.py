"""Tests of `ladderstitch export`: files, outputs equal to those of torch, and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

from ladderstitch.cli import app
from ladderstitch.importers.image_settings import ImageSettings, read_settings
from ladderstitch.importers.onnx_bundle import import_networks
from ladderstitch.importers.onnx_networks import FamilyInfo
from ladderstitch.vision.engine.startup import open_executor
from tests.support.onnx_networks import random_images

TOKENS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
CODE = """
import torch

class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Conv2d(1, 4, 3)

    def forward(self, x):
        maps = self.layer(x)
        return {"maps": maps, "means": maps.mean((2, 3)), "parts": (maps[:, :1], maps[:, 1:])}

class Fixed(Two):
    def forward(self, x):
        return self.layer(x).reshape(2, -1)

class Constant(Two):
    def forward(self, x):
        return self.layer(x).reshape(len(x.tolist()), -1)

class Branch(Two):
    def forward(self, x):
        return self.layer(x) if float(x.abs().sum()) else 1 + self.layer(x)

class Sum(Two):
    def forward(self, x):
        return self.layer(x).sum()

def other():
    return 7
"""


def export(*options: str) -> str:
    """Run the command; return its output, or raise what it says."""
    result = CliRunner().invoke(app, ["export", *options])
    text = " ".join(result.output.split())
    assert result.exit_code in (0, 2), result.output
    if result.exit_code:
        raise ValueError(text)
    return text


def outputs_of(path: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    """Return all outputs of an ONNX file."""
    session = onnxruntime.InferenceSession(str(path))
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"pixels": images}), strict=True))


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder, which is the current one, with a module of the user."""
    (tmp_path / "own_code.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_code", raising=False)
    return tmp_path


def test_folder_of_transformers_is_exported_and_served(tmp_path: Path) -> None:
    from transformers import BeitConfig, BeitForImageClassification, BeitImageProcessorPil

    torch.manual_seed(0)
    labels = dict(enumerate(("cat", "dog", "fish")))
    network = BeitForImageClassification(BeitConfig(**TOKENS, id2label=labels)).eval()
    network.save_pretrained(tmp_path / "beit")
    size = {"height": 32, "width": 32}
    processor = BeitImageProcessorPil(size=size, image_mean=[0.4] * 3, do_center_crop=False)
    processor.save_pretrained(tmp_path / "beit")
    file = tmp_path / "out" / "small.onnx"
    assert "logits: [batch, 3]" in export(str(tmp_path / "beit"), "--output", str(file))
    settings = read_settings(file)
    assert (settings.size, settings.mean) == ((32, 32), (0.4,) * 3)
    assert settings.labels == ("cat", "dog", "fish")
    images = random_images(3)
    with torch.no_grad():
        expected = network(torch.from_numpy(images)).logits.numpy()
    bundle = import_networks([file], FamilyInfo("beit"), tmp_path / "bundle")
    served = open_executor(bundle, 1, lambda done, total: None)(images, 0)
    np.testing.assert_allclose(served, expected, atol=1e-5)


def test_tower_of_images_is_exported_from_a_network_of_images_and_texts(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config=TOKENS, text_config=text, projection_dim=12)
    whole = CLIPModel(config).eval()
    whole.save_pretrained(tmp_path / "clip")
    file = tmp_path / "clip.onnx"
    names = "image_embeds,last_hidden_state"
    export(str(tmp_path / "clip"), "--output", str(file), "--outputs", names)
    images = random_images(5)
    with torch.no_grad():
        tokens = whole.vision_model(torch.from_numpy(images))
        embedded = whole.visual_projection(tokens.pooler_output)
    got = outputs_of(file, images)
    expected = {"image_embeds": embedded, "last_hidden_state": tokens.last_hidden_state}
    assert list(got) == list(expected)
    for name, values in got.items():
        np.testing.assert_allclose(values, expected[name].numpy(), atol=1e-5)
    with pytest.raises(ValueError, match=r"outputs: expected some of .*'image_embeds'.*got .*'no"):
        export(str(tmp_path / "clip"), "--output", str(file), "--outputs", "no")


def test_own_code_returns_a_module_with_several_outputs(code: Path) -> None:
    file = code / "two.onnx"
    text = export("own_code:Two", "--shape", "1,8,9", "--output", str(file))
    assert "parts_1: [batch, 3, 6, 7]" in text
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(1, 4, 3)
    images = random_images(3, shape=(1, 8, 9))
    with torch.no_grad():
        expected = layer(torch.from_numpy(images)).numpy()
    got = outputs_of(file, images)
    assert list(got) == ["maps", "means", "parts_0", "parts_1"]
    np.testing.assert_allclose(got["maps"], expected, atol=1e-5)
    np.testing.assert_allclose(got["means"], expected.mean((2, 3)), atol=1e-5)
    assert read_settings(file) == ImageSettings()


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("own_code:Fixed", (), r"expected \[1, ...\] for a batch of 1, got \[2, 84\] .* \[2, 84\]"),
        ("own_code:Constant", (), r"expected \[1, ...\] for a batch of 1, got .* and \[1, 168\]"),
        ("own_code:Branch", (), "output: expected a difference of at most 0.0001 .* got"),
        ("own_code:Sum", (), r"expected outputs \[batch, ...\], got \[\]"),
        ("own_code:other", (), "own_code:other: expected a torch module, got int"),
        ("own_code:absent", (), "own_code:absent: AttributeError: .*absent"),
        ("no_such_code:main", (), "no_such_code:main: ModuleNotFoundError"),
        ("own_code:Two", ("--shape", "3,8,9"), r"does not run on inputs \[batch, 3, 8, 9\]"),
        ("own_code:Two", ("--shape", "1,8,x"), "shape: expected sizes such as 3,224,224, got"),
        ("own_code:Two", ("--pretrained",), "pretrained: expected a source timm:NAME"),
        ("timm:resnet18", (), "timm:resnet18: expected --checkpoint FILE or --pretrained, got"),
        ("timm:resnet18", ("--checkpoint", "no.pth"), "checkpoint: expected a file, got no.pth"),
        ("own_code", (), "source: expected a folder of transformers, timm:NAME or module:fun"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    source: str, options: tuple[str, ...], message: str, code: Path
) -> None:
    file = code / "out.onnx"
    with pytest.raises(ValueError, match=message):
        export(source, "--output", str(file), "--shape", "1,8,9", *options)
    assert not file.exists()


def test_shape_of_own_code_and_name_of_the_file_are_needed(code: Path) -> None:
    with pytest.raises(ValueError, match="shape: expected that of one input of own_code:Two"):
        export("own_code:Two", "--output", "out.onnx")
    with pytest.raises(ValueError, match=r"output: expected a file that ends in .onnx, got out"):
        export("own_code:Two", "--output", "out", "--shape", "1,8,9")


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_missing_library_is_named(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    source = {"transformers": (str(tmp_path),), "timm": ("timm:resnet18", "--pretrained")}
    with pytest.raises(ValueError, match=f"pip install {library}"):
        export(*source[library], "--output", str(tmp_path / "out.onnx"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["NoSuchNetwork"]}, r"architectures: expected one of transformers"),
        ({}, r"architectures: expected one of transformers, got None"),
        ({"architectures": ["BeitModel"], "model_type": "beit"}, "transformers cannot open it"),
        ([], "expected fields, got list"),
    ],
)
def test_wrong_folder_is_refused(config: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        export(str(tmp_path), "--output", str(tmp_path / "out.onnx"))


def test_folder_without_the_weights_of_its_network_is_refused(tmp_path: Path) -> None:
    from transformers import BeitConfig, BeitModel

    BeitModel(BeitConfig(**TOKENS)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["BeitForImageClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"all weights of BeitForImage.*'classifier.bias'"):
        export(str(tmp_path), "--output", str(tmp_path / "out.onnx"))

"""Import of AttentiveNAS: the original's checkpoint and configuration files, and wrong ones."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from typer.testing import CliRunner

from ladderstitch.cli import app
from ladderstitch.errors import BundleError, ConfigError
from ladderstitch.importers.checkpoints import read_weights
from ladderstitch.importers.import_bundle import BundleInfo
from ladderstitch.importers.import_nested import import_supernet
from ladderstitch.importers.nested_families import read_nested, released_config
from ladderstitch.vision.bundle import VisionBundle
from tests.support.attentive_reference import (
    CLASSES,
    IMAGE_SIZE,
    SPACE,
    Network,
    extreme_path,
    make_checkpoint,
)

CHANNELS = 3
INFO = BundleInfo("net", "none")
SMALL = extreme_path(SPACE, min)
LARGE = extreme_path(SPACE, max)
runner = CliRunner()


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], **more: object) -> Path:
    """Write tensors as the original's training does."""
    path = folder / "attentive_nas.pth.tar"
    state = {f"module.{name}": tensor for name, tensor in tensors.items()}
    checkpoint = {"epoch": 1, "state_dict": state, **more}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    return path


def write_config(folder: Path, space: dict[str, Any] | None = None, **more: object) -> Path:
    """Write a configuration in the form of the original's evaluation files."""
    networks = {
        "supernet_checkpoint_path": "unused",
        "a0": {"model": "small", **SMALL},
        "a5_1": {"model": "large", **LARGE},
    }
    fields = {
        "arch": "attentive_nas_static_model",
        "n_classes": CLASSES,
        "image_size": IMAGE_SIZE,
        "pareto_models": networks,
        "supernet_config": SPACE if space is None else space,
    }
    path = folder / "eval.yml"
    path.write_text(yaml.safe_dump(fields | more))
    return path


def test_networks_of_the_evaluation_file_are_the_paths(tmp_path: Path) -> None:
    tensors = make_checkpoint(SPACE, CHANNELS)
    checkpoint = write_checkpoint(tmp_path, tensors)
    config = write_config(tmp_path)
    model = import_supernet("attentivenas", checkpoint, config, INFO, tmp_path / "net")
    images = torch.randn(2, CHANNELS, IMAGE_SIZE, IMAGE_SIZE)
    for stitch, path in enumerate((SMALL, LARGE)):
        wanted = Network(tensors, SPACE, path)(images)
        torch.testing.assert_close(model(images, stitch), wanted, atol=1e-4, rtol=1e-4)
    bundle = VisionBundle.load(tmp_path / "net")
    assert [variant.name for variant in bundle.manifest.variants()] == ["a0", "a5_1"]
    stored = bundle.load_nested()(images, 1)  # in half precision
    torch.testing.assert_close(stored, model(images, 1), atol=0.05, rtol=0.05)


def test_the_command_samples_paths(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, make_checkpoint(SPACE, CHANNELS))
    config = write_config(tmp_path)
    command = ["import", str(checkpoint), "--family", "attentivenas", "--config", str(config)]
    result = runner.invoke(app, [*command, "--paths", "7", "--into", str(tmp_path / "net")])
    assert result.exit_code == 0, result.output
    manifest = VisionBundle.load(tmp_path / "net").manifest
    assert len(manifest.variants()) == 7
    assert len({manifest.config.image_size(v.id) for v in manifest.variants()}) > 1


def test_checkpoints_with_the_training_configuration_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the original's configurations are dictionaries that are their own attributes
    kind = type("AttrDict", (dict,), {"__module__": "utils.config"})
    for name in ("utils", "utils.config"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["utils.config"], "AttrDict", kind, raising=False)
    fields = kind({"epochs": 3})
    fields.__dict__ = fields
    path = write_checkpoint(tmp_path, {"x": torch.ones(2)}, args=fields)
    assert read_weights(path).keys() == {"x"}


def test_the_published_supernet_needs_no_configuration() -> None:
    config = read_nested("attentivenas", released_config("attentivenas", {}), 5)
    sizes = config.net.sizes(config.inputs)
    assert sizes.parameters["first_conv.conv.conv.weight"] == (24, 3, 3, 3)
    assert len({name.split(".")[1] for name in sizes.parameters if "blocks." in name}) == 37
    assert sizes.parameters["classifier.linear.linear.weight"] == (1000, 1984)
    assert [config.image_size(path) for path in (0, 4)] == [192, 288]


def test_wrong_files_are_named(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    tensors = make_checkpoint(SPACE, CHANNELS)
    tensors["blocks.3.shortcut.extra.weight"] = tensors.pop("blocks.3.shortcut.conv.conv.weight")
    checkpoint = write_checkpoint(tmp_path, tensors)
    with pytest.raises(BundleError, match=r"blocks\.3\.shortcut\.conv\.conv\.weight"):
        import_supernet("attentivenas", checkpoint, config, INFO, tmp_path / "net")
    with pytest.raises(BundleError, match="wrong tensors"):
        import_supernet("attentivenas", checkpoint, None, INFO, tmp_path / "net")
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("mb2", {"act_func": "h_swish"}, "mb2.act_func: expected swish, got h_swish"),
        ("first_conv", {"s": 1}, "first_conv.s: expected 2, got 1"),
        ("mb3", None, r"expected mb1, mb2 and so on, got \['mb1', 'mb2', 'mb4'\]"),
        ("channels_per_group", 8, "channels_per_group: expected 1, got 8"),
        ("last_conv", "x", "supernet_config.last_conv: expected fields, got str"),
    ],
)
def test_what_the_layout_lacks_is_named(part: str, change: Any, message: str) -> None:
    space = dict(SPACE)
    if change is None:
        del space[part]
    else:
        space[part] = space[part] | change if isinstance(change, dict) else change
    with pytest.raises(ConfigError, match=message):
        read_nested("attentivenas", {"n_classes": 5, "supernet_config": space}, 3)


def test_a_missing_field_is_named() -> None:
    space = SPACE | {"mb1": {k: v for k, v in SPACE["mb1"].items() if k != "se"}}
    with pytest.raises(ConfigError, match="expected the field 'se'"):
        read_nested("attentivenas", {"n_classes": 5, "supernet_config": space}, 3)

"""Tests of the import of supernets: recorded outputs, planted mistakes, older names, bundles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ladderstitch.cli import app
from ladderstitch.errors import BundleError, ConfigError
from ladderstitch.importers.import_bundle import BundleInfo
from ladderstitch.importers.import_nested import import_supernet
from ladderstitch.importers.nested_families import LAYOUTS, read_nested, released_config
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.models.nested.cost import path_costs
from tests.conftest import GOLDEN, golden_cases

runner = CliRunner()
INFO = BundleInfo("net", "none")


def write_checkpoint(case: str, folder: Path, rename: tuple[str, str] | None = None) -> Path:
    """Write the weights of a golden case as a checkpoint, under other names if stated."""
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    weights = {
        name.removeprefix("weights."): tensor
        for name, tensor in tensors.items()
        if name.startswith("weights.")
    }
    if rename is not None:
        weights = {name.replace(*rename): tensor for name, tensor in weights.items()}
    path = folder / f"{case}.pth"
    torch.save({"state_dict": weights}, path)
    return path


def write_config(case: str, folder: Path, **more: object) -> Path:
    """Write the upstream configuration of a golden case, with further fields."""
    fields = json.loads((GOLDEN / f"{case}.json").read_text())["config"] | more
    path = folder / "config.json"
    path.write_text(json.dumps(fields))
    return path


def plant_mistake(tmp_path: Path, case: str, tensor: str = "", **config: object) -> Path:
    """Write a copy of a golden case with one tensor scaled or some fields changed."""
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    if tensor:
        tensors[tensor] = tensors[tensor] * 1.01
    sheet = json.loads((GOLDEN / f"{case}.json").read_text())
    sheet["config"] |= config
    path = tmp_path / "planted.safetensors"
    save_file(tensors, path)
    path.with_suffix(".json").write_text(json.dumps(sheet))
    return path


def test_verify_passes_every_golden_case_of_supernets() -> None:
    cases = [case for family in LAYOUTS for case in golden_cases(family)]  # attentivenas has none
    assert len(cases) >= 3
    result = runner.invoke(app, ["verify", *map(str, cases)])
    assert result.exit_code == 0, result.output
    assert result.output.count("pass ") == len(cases)
    assert "pass ofa_mbv3: ofa-mbv3, 710 items" in result.output


@pytest.mark.parametrize(
    ("case", "tensor"),
    [
        ("ofa_mbv3", "weights.blocks.3.conv.depth_conv.conv.5to3_matrix"),
        ("ofa_mbv3", "recalibrated.max.blocks.1.conv.depth_conv.bn.bn.running_var"),
        ("autoformer", "weights.blocks.0.attn.rel_pos_embed_v.embeddings_table_h"),
    ],
)
def test_verify_detects_a_wrong_tensor(tmp_path: Path, case: str, tensor: str) -> None:
    result = runner.invoke(app, ["verify", str(plant_mistake(tmp_path, case, tensor))])
    assert result.exit_code == 1
    assert "outside tolerance: items" in result.output


def test_verify_detects_the_wrong_pooling(tmp_path: Path) -> None:
    path = plant_mistake(tmp_path, "autoformer", gp=False)
    assert runner.invoke(app, ["verify", str(path)]).exit_code == 1


def test_verify_names_an_option_that_is_not_supported(tmp_path: Path) -> None:
    result = runner.invoke(app, ["verify", str(plant_mistake(tmp_path, "autoformer", scale=True))])
    assert result.exit_code == 2
    assert "config.scale: expected False, got True" in result.output


def test_costs_of_autoformer_equal_the_parameters_of_the_original() -> None:
    sheet = json.loads((GOLDEN / "autoformer.json").read_text())
    paths = [{k: v for k, v in e.items() if k not in ("id", "params")} for e in sheet["ids"]]
    costs = path_costs(read_nested("autoformer", sheet["config"], paths))
    assert [cost.parameters for cost in costs.values()] == [e["params"] for e in sheet["ids"]]


def test_import_reads_older_names_and_samples_paths(tmp_path: Path) -> None:
    older = (".conv.depth_conv", ".mobile_inverted_conv.depth_conv")
    checkpoint = write_checkpoint("ofa_mbv3", tmp_path, older)
    config = write_config("ofa_mbv3", tmp_path)
    import_supernet("ofa-mbv3", checkpoint, config, INFO, tmp_path / "net", paths=9, seed=3)
    bundle = VisionBundle.load(tmp_path / "net")
    names = [stitch.name for stitch in bundle.manifest.variants()]
    assert (len(names), names[0], names[-1]) == (9, "smallest", "largest")
    costs = path_costs(bundle.manifest.config)
    assert costs[0].macs == min(c.macs for c in costs.values())
    assert costs[8].macs == max(c.macs for c in costs.values())
    tensors = load_file(GOLDEN / "ofa_mbv3.safetensors")
    got = bundle.load_nested()(tensors["input"], 8).numpy()
    # weights of bundles have half precision
    np.testing.assert_allclose(got, tensors["output.max"].numpy(), atol=0.05)


def test_import_takes_listed_paths(tmp_path: Path) -> None:
    listed = [{"name": "small", "embed_dim": 64, "layer_num": 1}]
    listed[0] |= {"mlp_ratio": [0.5], "num_heads": [1]}
    config = write_config("autoformer", tmp_path, paths=listed)
    checkpoint = write_checkpoint("autoformer", tmp_path)
    model = import_supernet("autoformer", checkpoint, config, INFO, tmp_path / "net")
    assert [stitch.name for stitch in model.stitches] == ["small"]
    with pytest.raises(ConfigError, match="expected a number or the list"):
        import_supernet("autoformer", checkpoint, config, INFO, tmp_path / "net", paths=4)


def test_import_names_wrong_tensors_and_paths(tmp_path: Path) -> None:
    checkpoint = write_checkpoint("autoformer", tmp_path)
    wide = write_config("autoformer", tmp_path, embed_dim=144)
    with pytest.raises(BundleError, match="29 wrong tensors"):
        import_supernet("autoformer", checkpoint, wide, INFO, tmp_path / "net", paths=2)
    path = {"embed_dim": 128, "layer_num": 3, "mlp_ratio": [1.0] * 3, "num_heads": [2] * 3}
    deep = write_config("autoformer", tmp_path, paths=[path])
    with pytest.raises(ConfigError, match="expected at most 128 channels and 2 layers"):
        import_supernet("autoformer", checkpoint, deep, INFO, tmp_path / "net")


def test_published_sizes_follow_from_the_tensors() -> None:
    tiny = released_config("autoformer", {"pos_embed": torch.empty(1, 197, 256)})
    names = [stitch.name for stitch in read_nested("autoformer", tiny, 32).stitches()]
    assert (len(names), names[0], names[-1]) == (32, "smallest", "largest")
    config = read_nested("autoformer", tiny, 5)
    largest = path_costs(config)[4]
    assert 10e6 < largest.parameters < 11e6  # supernet-tiny: width 240, 14 layers
    wide = released_config("ofa-mbv3", {"first_conv.conv.weight": torch.empty(24, 3, 3, 3)})
    assert wide["width_mult"] == 1.2
    with pytest.raises(ConfigError, match="expected a file for this thinkingvit"):
        released_config("thinkingvit", {})

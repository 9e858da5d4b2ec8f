"""Tests of `ladderstitch verify`: golden cases pass, planted mistakes are found and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ladderstitch.cli import app
from ladderstitch.importers.stitched_families import LAYOUTS
from tests.conftest import GOLDEN, golden_cases

runner = CliRunner()


def plant_mistake(tmp_path: Path, *, tensor: str | None = None, **config: object) -> Path:
    """Write a copy of a golden case with one tensor or some configuration fields changed."""
    tensors = load_file(GOLDEN / "snnet_deit_k3s2.safetensors")
    if tensor:
        tensors[tensor] = tensors[tensor] * 1.01
    sheet = json.loads((GOLDEN / "snnet_deit_k3s2.json").read_text())
    sheet["config"] |= config
    path = tmp_path / "planted.safetensors"
    save_file(tensors, path)
    path.with_suffix(".json").write_text(json.dumps(sheet))
    return path


def test_verify_passes_every_golden_case_of_stitched_families(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cases = [case for family in LAYOUTS for case in golden_cases(family)]
    assert len(cases) >= 4
    result = runner.invoke(app, ["verify", *map(str, cases)])
    with capsys.disabled():
        print(f"\n{result.output}")  # noqa: T201  (the table: case, family, ids, largest error)
    assert result.exit_code == 0, result.output
    assert result.output.count("pass ") == len(cases)
    assert "pass snnet_deit_k3s2: snnet-deit, 43 ids, largest relative error" in result.output
    assert "pass snnetv2_12_24: snnetv2, 135 ids, largest relative error" in result.output


def test_verify_with_one_wrong_weight_exits_1(tmp_path: Path) -> None:
    path = plant_mistake(tmp_path, tensor="weights.stitch_layers.0.1.transform.bias")
    result = runner.invoke(app, ["verify", str(GOLDEN / "lsq_swin.safetensors"), str(path)])
    assert result.exit_code == 1
    assert "pass lsq_swin" in result.output
    assert "FAIL planted" in result.output
    assert "outside tolerance: ids [12" in result.output


@pytest.mark.parametrize(
    "mistake",
    [{"final_norm_on_stitches": True}, {"final_norm_on_anchors": False}, {"layer_norm_eps": 1e-5}],
    ids=lambda m: next(iter(m)),
)
def test_verify_detects_typical_configuration_mistakes(
    tmp_path: Path, mistake: dict[str, object]
) -> None:
    assert runner.invoke(app, ["verify", str(plant_mistake(tmp_path, **mistake))]).exit_code == 1


def test_verify_detects_a_wrong_enumeration(tmp_path: Path) -> None:
    result = runner.invoke(app, ["verify", str(plant_mistake(tmp_path, nearest_stitching=False))])
    assert result.exit_code == 2
    assert "missing stitch_layers.2.0.transform.bias" in result.output.replace("\n", "")


def test_verify_of_least_squares_with_a_wrong_anchor_exits_1(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "lsq_swin.safetensors")
    tensors["weights.anchors.0.layers.2.blocks.0.mlp.fc1.weight"] *= -1
    save_file(tensors, tmp_path / "lsq.safetensors")
    (tmp_path / "lsq.json").write_text((GOLDEN / "lsq_swin.json").read_text())
    result = runner.invoke(app, ["verify", str(tmp_path / "lsq.safetensors")])
    assert result.exit_code == 1


def test_verify_names_files_that_are_not_a_case(tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\xff" * 20)
    broken.with_suffix(".json").write_text('{"family": "snnet-deit"}')
    for path in (tmp_path / "absent.safetensors", broken):
        result = runner.invoke(app, ["verify", str(path)])
        assert result.exit_code == 2
        assert path.stem in result.output.replace("\n", "")


def test_verify_of_an_unknown_family_lists_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"input": torch.zeros(1)}, path)
    path.with_suffix(".json").write_text('{"family": "mystery", "config": {}}')
    result = runner.invoke(app, ["verify", str(path)])
    assert result.exit_code == 2
    assert "snnet-deit" in result.output

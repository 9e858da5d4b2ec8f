"""Tests of language models against recorded outputs of the originals, on 1, 2 and 4 ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ladderstitch.cli import app
from ladderstitch.importers.verify_text import FAMILIES
from tests.conftest import GOLDEN, golden_cases

runner = CliRunner()
CASES = [case for family in FAMILIES for case in golden_cases(family)]


def plant_mistake(tmp_path: Path, case: str, change: dict[str, object]) -> Path:
    """Write a copy of a golden case with one field of its configuration changed."""
    metadata = json.loads((GOLDEN / f"{case}.json").read_text())
    metadata["config"]["hf_config"] |= change
    path = tmp_path / f"{case}.safetensors"
    save_file(load_file(GOLDEN / f"{case}.safetensors"), path)
    path.with_suffix(".json").write_text(json.dumps(metadata))
    return path


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_verify_passes_every_output_on_every_rank_count(case: Path) -> None:
    result = runner.invoke(app, ["verify", str(case)])
    assert result.exit_code == 0, result.output
    assert f"pass {case.stem}" in result.output


def test_golden_folder_has_the_expected_text_cases() -> None:
    assert {"desync_gpt", "hf_llama_tied_rope"} <= {case.stem for case in CASES}


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 10_000.0},
        {"rope_scaling": None},
        {"rms_norm_eps": 1e-6},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ],
    ids=["base", "scaling", "epsilon", "kind"],
)
def test_verify_detects_typical_configuration_mistakes(
    tmp_path: Path, change: dict[str, object]
) -> None:
    path = plant_mistake(tmp_path, "hf_llama_tied_rope", change)
    result = runner.invoke(app, ["verify", str(path)])
    assert result.exit_code == 1
    assert "FAIL hf_llama_tied_rope" in result.output

"""Tests of language models against recorded outputs of the originals, on up to 4 ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ladderstitch.cli import app
from ladderstitch.importers.verify_text import FAMILIES, GoldenRun, run_case
from ladderstitch.text.hugging_face.architectures import read_architecture
from ladderstitch.text.model.residual import ResidualScheme
from ladderstitch.text.model.weight_reader import MemoryWeights
from tests.conftest import GOLDEN, golden_cases
from tests.support.language_models import random_tensors

runner = CliRunner()
IDS = ("full", "incremental")
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


def write_case(folder: Path, heads: int, kv_heads: int) -> Path:
    """Write a case with these heads, recorded on one rank."""
    fields = {
        "vocab_size": 33,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "model_type": "llama",
    }
    config = read_architecture(fields).config
    weights = random_tensors(config)
    tokens = torch.arange(24).view(2, 12) % config.vocab_size
    runs = {name: GoldenRun(name, ResidualScheme(), (1,), name == "incremental") for name in IDS}
    tensors = {f"weights.{name}": tensor for name, tensor in weights.items()} | {"input": tokens}
    for name, run in runs.items():
        tensors[f"output.{name}"] = run_case(config, MemoryWeights(weights), tokens, run, 1, 5)
    path = folder / "heads.safetensors"
    save_file(tensors, path)
    metadata = {
        "family": "hf-llama",
        "config": {"hf_config": fields, "prefill_length": 5},
        "ids": [{"id": name} for name in IDS],
        "tolerance": {"suggested_atol": 2e-4, "suggested_rtol": 1e-4},
    }
    path.with_suffix(".json").write_text(json.dumps(metadata))
    return path


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks"),
    [
        (6, 2, "1, 2, 3"),
        (9, 3, "1, 2, 3"),
        (5, 1, "1"),
        (3, 1, "1, 3"),
        (8, 2, "1, 2, 4"),
        (7, 7, "1, 2, 4"),
    ],
)
def test_verify_runs_and_names_the_rank_counts_that_fit(
    tmp_path: Path, heads: int, kv_heads: int, ranks: str
) -> None:
    result = runner.invoke(app, ["verify", str(write_case(tmp_path, heads, kv_heads))])
    assert result.exit_code == 0, result.output
    items = 2 * len(ranks.split(", "))
    assert f"pass heads: hf-llama, {items} outputs on {ranks} ranks" in result.output


def test_verify_names_a_recorded_rank_count_that_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "desync_gpt.safetensors"
    save_file(load_file(GOLDEN / path.name), path)
    metadata = json.loads((GOLDEN / "desync_gpt.json").read_text())
    (entry,) = [entry for entry in metadata["ids"] if entry["id"] == "desync_2x_tp2"]
    entry["tensor_parallel_size"] = 7
    path.with_suffix(".json").write_text(json.dumps(metadata))
    result = runner.invoke(app, ["verify", str(path)])
    assert result.exit_code == 2, result.output
    assert "desync_2x_tp2: recorded on 7 ranks; ranks: expected" in result.output

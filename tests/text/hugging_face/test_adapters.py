"""PEFT adapters as paths, compared with transformers on merged weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import save_file

from ladderstitch.errors import BundleError, ConfigError
from ladderstitch.importers.verify_text import GoldenRun, run_case
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.hugging_face.adapter import read_adapter
from ladderstitch.text.model.weight_reader import DeltaWeights, load_delta
from ladderstitch.training.text.adapters import add_adapter
from ladderstitch.training.text.calibrate import Sample
from tests.support.hugging_face_folders import write_folder

FIELDS = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 6,
    "bias": "none",
    "target_modules": ["q_proj", "down_proj"],
    "lora_dropout": 0.1,
    "base_model_name_or_path": "base",
    "inference_mode": True,
}
MODULES = ("self_attn.q_proj", "mlp.down_proj")
SAMPLE = Sample(tokens=64, window=16)


def write_adapter(folder: Path, model: Any, **changes: Any) -> dict[str, tuple[Any, Any]]:
    """Write random factors for two modules of each layer; return them by module name."""
    folder.mkdir()
    factors, tensors = {}, {}
    for layer in range(model.config.num_hidden_layers):
        for part in MODULES:
            name = f"model.layers.{layer}.{part}"
            rows, columns = model.get_submodule(name).weight.shape
            a, b = torch.randn(4, columns) * 0.3, torch.randn(rows, 4) * 0.3
            factors[name] = a, b
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
    (folder / "adapter_config.json").write_text(json.dumps(FIELDS | changes))
    save_file(tensors, folder / "adapter_model.safetensors")
    return factors


@pytest.mark.parametrize(
    ("name", "changes", "scale"),
    [
        ("mistral", {}, 6 / 4),
        ("qwen3", {"use_rslora": True}, 6 / math.sqrt(4)),
    ],
)
def test_adapter_is_a_path_with_the_logits_of_merged_weights(
    name: str, changes: dict[str, Any], scale: float, tmp_path: Path
) -> None:
    model = write_folder(tmp_path / "base", name)
    factors = write_adapter(tmp_path / "mine", model, **changes)
    text = tmp_path / "text.txt"
    text.write_text("a text of words that are long enough to be measured. " * 10)
    with Progress(disable=True) as progress:
        add_adapter(
            TextBundle.load(tmp_path / "base"), tmp_path / "mine", "mine", text, SAMPLE, progress
        )
    bundle = TextBundle.load(tmp_path / "base")
    assert [path.name for path in bundle.manifest.variants] == ["standard", "mine"]
    tokens = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    delta = load_delta(tmp_path / "base" / "mine.safetensors")
    run = GoldenRun("", bundle.manifest.variants[1].residual, (1, 2), incremental=True)
    for merged in (False, True):
        weights = DeltaWeights(bundle.weights(), delta) if merged else bundle.weights()
        if merged:
            for module, (a, b) in factors.items():
                model.get_submodule(module).weight.data += scale * b @ a
        with torch.inference_mode():
            expected = model(tokens).logits
        for ranks in run.rank_counts:
            got = run_case(bundle.manifest.config, weights, tokens, run, ranks, prefill=7)
            torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: expected 'LORA', got 'IA3'"),
        ({"use_dora": True}, "use_dora: expected False, got True"),
        ({"bias": "all"}, "bias: expected 'none', got 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: expected none, got"),
        ({"lora_alpha": float("inf")}, "lora_alpha: expected finite numbers, got inf"),
        ({"alpha_pattern": {"q_proj": "8"}}, "lora_alpha: expected finite numbers, got '8'"),
        ({"new_scale": 3}, r"adapter_config\.json: .* does not know.*; got new_scale"),
    ],
)
def test_other_adapters_are_refused_by_the_name_of_the_field(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "mine", write_folder(tmp_path / "base", "mistral"), **changes)
    with pytest.raises(BundleError, match=message):
        read_adapter(tmp_path / "mine")


def test_adapter_of_another_model_and_taken_name_are_refused(tmp_path: Path) -> None:
    bundle = TextBundle.load(_written(tmp_path / "base", "mistral"))
    write_adapter(tmp_path / "mine", write_folder(tmp_path / "other", "llama"))
    arguments = (tmp_path / "text.txt", SAMPLE, Progress(disable=True))
    with pytest.raises(BundleError, match=r"delta: \d+ wrong tensors: .*q_proj"):
        add_adapter(bundle, tmp_path / "mine", "mine", *arguments)
    with pytest.raises(ConfigError, match="name: expected one that the bundle lacks"):
        add_adapter(bundle, tmp_path / "mine", "standard", *arguments)
    rotated = TextBundle.load(_written(tmp_path / "phi", "phi3"))
    write_adapter(tmp_path / "third", write_folder(tmp_path / "source", "mistral"))
    with pytest.raises((BundleError, ConfigError)):
        add_adapter(rotated, tmp_path / "third", "third", *arguments)


def _written(folder: Path, name: str) -> Path:
    write_folder(folder, name)
    return folder

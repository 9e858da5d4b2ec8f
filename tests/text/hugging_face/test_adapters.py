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
SAMPLE = Sample(tokens=64, window=16)


def write_adapter(folder: Path, model: Any, **changes: Any) -> dict[str, tuple[Any, Any]]:
    """Write random factors for all linear modules; return them by module name."""
    folder.mkdir()
    factors, tensors = {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        if module.weight is model.get_input_embeddings().weight:
            continue  # a head that is tied has no adapter of its own
        rows, columns = module.weight.shape
        a, b = torch.randn(4, columns) * 0.2, torch.randn(rows, 4) * 0.2
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
        ("phi3", {}, 6 / 4),
        ("gemma2", {}, 6 / 4),
        ("olmo2", {}, 6 / 4),
        ("granite", {}, 6 / 4),
        ("cohere", {}, 6 / 4),
        ("gpt_neox", {}, 6 / 4),
        ("falcon multi-query", {}, 6 / 4),
        ("falcon heads", {}, 6 / 4),
        ("falcon groups", {}, 6 / 4),
    ],
)
def test_adapter_is_a_path_with_the_logits_of_merged_weights(
    name: str, changes: dict[str, Any], scale: float, tmp_path: Path
) -> None:
    model = write_folder(tmp_path / "base", name)
    factors = write_adapter(tmp_path / "mine", model, **changes)
    with Progress(disable=True) as progress:
        add_adapter(
            TextBundle.load(tmp_path / "base"), tmp_path / "mine", "mine", None, SAMPLE, progress
        )
    bundle = TextBundle.load(tmp_path / "base")
    assert bundle.manifest.adapters == {1: "mine"}
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
            difference = (got - expected).abs().max() / expected.abs().max()
            assert difference < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: expected 'LORA', got 'IA3'"),
        ({"use_dora": True}, "use_dora: expected False, got True"),
        ({"bias": "all"}, "bias: expected 'none', got 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: expected none, got"),
        ({"lora_alpha": float("inf")}, "lora_alpha: expected finite numbers, got inf"),
        ({"alpha_pattern": {"q_proj": "8"}}, "lora_alpha: expected finite numbers, got '8'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: expected True or .*, got 'pissa'"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication: expected none, got"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens: expected none, got"),
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
    (tmp_path / "base" / "quality.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"text: expected a held-out text, as .*quality\.json"):
        add_adapter(bundle, tmp_path / "mine", "mine", None, *arguments[1:])


def _written(folder: Path, name: str) -> Path:
    write_folder(folder, name)
    return folder

"""Folders that transformers writes, with random weights, compared with transformers' own logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ladderstitch.api.openai.requests import CompletionRequest
from ladderstitch.errors import BundleError
from ladderstitch.importers.verify_text import GoldenRun, run_case
from ladderstitch.scheduling.sampling import Sampling
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.manifest import TextManifest
from tests.support.hugging_face_folders import OWN, write_folder
from tests.support.language_models import END


def random_tokens() -> Tensor:
    return torch.randint(3, END, (2, 30), generator=torch.Generator().manual_seed(0))


def logits_of(bundle: TextBundle, tokens: Tensor, ranks: int, *, incremental: bool) -> Tensor:
    residual = bundle.manifest.variants[0].residual
    run = GoldenRun("", residual, (ranks,), incremental)
    return run_case(bundle.manifest.config, bundle.weights(), tokens, run, ranks, prefill=11)


@pytest.mark.parametrize("name", OWN)
def test_folder_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model, tokens = write_folder(tmp_path, name), random_tokens()
    with torch.inference_mode():
        expected = model(tokens).logits
    bundle = TextBundle.load(tmp_path)
    assert bundle.manifest.end_tokens == (END,)
    for ranks in (1, 2, 3):
        for incremental in (False, True):
            got = logits_of(bundle, tokens, ranks, incremental=incremental)
            torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


def test_bin_files_and_shards_give_the_same_logits(tmp_path: Path) -> None:
    model, tokens = write_folder(tmp_path, "qwen3"), random_tokens()
    expected = logits_of(TextBundle.load(tmp_path), tokens, 1, incremental=False)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert torch.equal(logits_of(TextBundle.load(tmp_path), tokens, 1, incremental=False), expected)
    (tmp_path / "pytorch_model.bin").unlink()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(
        logits_of(TextBundle.load(tmp_path), tokens, 2, incremental=False),
        logits_of(TextBundle.load(tmp_path), tokens, 2, incremental=False),
    )
    got = logits_of(TextBundle.load(tmp_path), tokens, 1, incremental=False)
    assert torch.equal(got, expected)


class Hostile:
    """An object that would write a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (self.file, "run")


def test_code_in_a_bin_file_is_refused_and_not_run(tmp_path: Path) -> None:
    write_folder(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Hostile(tmp_path / "proof")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BundleError, match=r"pytorch_model\.bin: expected a file with tensors only"):
        TextBundle.load(tmp_path)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type: expected one of llama, .*, got 'mamba'"),
        ({"model_type": ["llama"]}, "model_type: expected one of llama"),
        ({"hidden_act": "relu"}, "hidden_act: expected silu, .*, got 'relu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type: expected"),
        ({"logit_bias_scale": 2}, "does not know.*; got logit_bias_scale"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected none, got"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: expected a positive number, got -1"),
        ({"vocab_size": None}, "config.json: expected the field vocab_size"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads: expected a int, got str"),
        ({"num_key_value_heads": 4}, "kv_heads: expected a divisor of 6, got 4"),
        ({"intermediate_size": 99}, "wrong tensors: .*down_proj"),
        ({"eos_token_id": "</s>"}, "eos_token_id: expected a number or a list"),
        ({"eos_token_id": [2, 500]}, "end_tokens: expected 0 to 256, got .500"),
    ],
)
def test_wrong_folder_is_refused_with_the_name_of_the_field(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_folder(tmp_path, "llama")
    (tmp_path / "generation_config.json").unlink()
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(BundleError, match=message):
        TextBundle.load(tmp_path)


def test_recommended_sampling_and_template_are_taken_over(tmp_path: Path) -> None:
    write_folder(tmp_path, "llama")
    recommended = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [END, 7]}
    (tmp_path / "generation_config.json").write_text(json.dumps(recommended))
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    manifest = TextBundle.load(tmp_path).manifest
    assert manifest.end_tokens == (END, 7)
    assert manifest.chat_template == "d"
    unset = CompletionRequest(model="m", prompt="x").sampling(manifest.sampling)
    assert (unset.temperature, unset.top_p, unset.top_k) == (0.6, 0.9, 0)
    stated = CompletionRequest(model="m", prompt="x", temperature=0, top_p=1, top_k=-1)
    assert stated.sampling(manifest.sampling) == Sampling(temperature=0, top_p=1.0)
    (tmp_path / "chat_template.jinja").write_text("own")
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    manifest = TextBundle.load(tmp_path).manifest
    assert (manifest.chat_template, manifest.sampling.temperature) == ("own", 1.0)


def test_ladder_of_normed_outputs_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, "gemma2")
    manifest = TextBundle.load(tmp_path).manifest
    fields = manifest.model_dump() | {"residual": {"scheme": "ladder"}}
    with pytest.raises(ValueError, match="norms of outputs or over all heads need complete"):
        TextManifest.model_validate(fields)

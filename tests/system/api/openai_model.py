"""A small random model with a chat template that has tools, and the same model in transformers."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
import yaml
from safetensors.torch import load_file

from tests.support.language_models import END, TINY, write_tiny

HERMES = (
    "{% if tools %}{% for t in tools %}<tool>{{ t.function.name }}</tool>{% endfor %}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
MAX_POSITIONS = 1024


def write_tool_bundle(path: Path, name: str = "tiny", template: str = HERMES) -> Path:
    """Write a tiny bundle with a chat template and a longer context, and return its path."""
    write_tiny(path)
    manifest = yaml.safe_load((path / "model.yaml").read_text())
    manifest["name"], manifest["chat_template"] = name, template
    manifest["config"]["max_positions"] = MAX_POSITIONS
    (path / "model.yaml").write_text(yaml.safe_dump(manifest))
    return path


def transformers_model(bundle: Path) -> transformers.LlamaForCausalLM:
    """Return the model of a bundle in transformers."""
    config = transformers.LlamaConfig(
        vocab_size=TINY.vocab_size,
        hidden_size=TINY.hidden_size,
        intermediate_size=TINY.intermediate_size,
        num_hidden_layers=TINY.layers,
        num_attention_heads=TINY.heads,
        num_key_value_heads=TINY.kv_heads,
        head_dim=TINY.head_dim,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=TINY.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": TINY.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(load_file(bundle / "model.safetensors"), False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def log_probabilities(model: transformers.LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    """Return the log probabilities [T, V] after each token."""
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)

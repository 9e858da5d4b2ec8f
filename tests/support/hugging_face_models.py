"""Random models of transformers, one for each architecture and variant.

This module needs torch and transformers only, 4 or 5, so that other environments can import it.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

END = 256
"""The end token of a vocabulary with one token per byte."""
SIZES = {
    "vocab_size": END + 1,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": END,
}
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama tied, linear rope": (
        "Llama",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    ),
    "llama, yarn": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 40,
                "rope_theta": 20_000.0,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2 windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {"head_dim": 20, "attention_bias": True}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 10,
            "query_pre_attn_scalar": 30,
            "sliding_window": 7,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        {"head_dim": 10, "query_pre_attn_scalar": 17, "sliding_window": 4, "num_hidden_layers": 7},
    ),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.5}),
    "phi3 window": ("Phi3", {"sliding_window": 6}),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1, 0]}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 2.5,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 3.0,
            "attention_bias": True,
        },
    ),
    "cohere": ("Cohere", {"logit_scale": 0.3}),
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.5, "intermediate_size": 72}),
    "gpt_neox sequential": ("GPTNeoX", {"use_parallel_residual": False, "attention_bias": False}),
    "falcon multi-query": ("Falcon", {"multi_query": True, "ffn_hidden_size": 112}),
    "falcon heads": ("Falcon", {"multi_query": False, "bias": True}),
    "falcon sequential": ("Falcon", {"parallel_attn": False, "bias": True}),
    "falcon groups": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 3}),
    "falcon groups, one norm": (
        "Falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, llama3 rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 500_000.0,
            }
        },
    ),
    "phi3, longrope": (
        "Phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 2.0, 3.0, 4.0],
            },
        },
    ),
    "mistral tied": ("Mistral", {"tie_word_embeddings": True, "sliding_window": None}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3 tied": ("Qwen3", {"tie_word_embeddings": True}),
    "gemma2 untied": ("Gemma2", {"tie_word_embeddings": False, "head_dim": 8}),
    "gemma3 untied": ("Gemma3", {"tie_word_embeddings": False, "head_dim": 8}),
    "phi3 tied": ("Phi3", {"tie_word_embeddings": True}),
    "olmo2 tied, grouped": ("Olmo2", {"tie_word_embeddings": True, "num_key_value_heads": 3}),
    "smollm3 untied": ("SmolLM3", {"tie_word_embeddings": False}),
    "granite tied": ("Granite", {"tie_word_embeddings": True}),
    "cohere untied": ("Cohere", {"tie_word_embeddings": False, "attention_bias": True}),
    "gpt_neox tied": ("GPTNeoX", {"tie_word_embeddings": True, "rotary_pct": 1.0}),
    "falcon untied": ("Falcon", {"tie_word_embeddings": False, "multi_query": True}),
}
"""Further variants, for `make verify-own-models`."""
CONFIG_NAMES = {"Gemma3": "Gemma3TextConfig"}


def make_model(name: str) -> Any:
    """Return a random model in evaluation mode."""
    kind, own = (OWN | MORE)[name]
    fields = SIZES | own
    if kind in ("Falcon", "GPTNeoX"):  # they have other fields, and write unknown ones
        del fields["num_key_value_heads"]
    if kind == "Falcon":
        del fields["intermediate_size"]
    if transformers.__version__.startswith("4."):
        fields = _fields_of_version_4(fields)
    config_type = getattr(transformers, CONFIG_NAMES.get(kind, f"{kind}Config"))
    torch.manual_seed(len(name))
    model = getattr(transformers, f"{kind}ForCausalLM")(config_type(**fields)).eval()
    for tensor in model.parameters():  # also norms and biases, which are 1 and 0 at first
        tensor.data = tensor.data * 3 + 0.1 * torch.randn(tensor.shape)
    return model


def _fields_of_version_4(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with the rotary parameters as transformers 4 names them."""
    rope = dict(fields.pop("rope_parameters", {}))
    if "rope_theta" in rope:
        fields["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type") == "longrope":
        rope["type"] = rope.pop("rope_type")
    return fields | ({"rope_scaling": rope} if rope else {})

"""Other layouts of the same weights, turned into the Hugging Face one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ladderstitch.text.model.config import LlamaConfig


def half_split(rows: Tensor, heads: int) -> Tensor:
    """Rows [H d, ...] of a query or key map for rotations of adjacent pairs (2i, 2i + 1), reordered
    for rotations of the pairs (i, i + d/2)."""
    width = rows.shape[0] // heads
    pairs = rows.reshape(heads, width // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def gpt_fast_config(args: Mapping[str, Any]) -> LlamaConfig:
    """`ModelArgs` of gpt-fast."""
    return LlamaConfig(
        vocab_size=args["vocab_size"],
        hidden_size=args["dim"],
        intermediate_size=args["intermediate_size"],
        layers=args["n_layer"],
        heads=args["n_head"],
        kv_heads=args["n_local_heads"],
        head_dim=args["dim"] // args["n_head"],
        max_positions=args["block_size"],
        norm_eps=args["norm_eps"],
        rope_theta=args["rope_base"],
    )


def from_gpt_fast(tensors: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """gpt-fast's names: fused `wqkv` and `w1` = [up; gate], or all five in `wqkv1` (parallel)."""
    d, ffn = config.head_dim, config.intermediate_size
    sizes = [config.heads * d, config.kv_heads * d, config.kv_heads * d]
    ours = {
        "model.embed_tokens.weight": tensors["tok_embeddings.weight"],
        "model.norm.weight": tensors["norm.weight"],
        "lm_head.weight": tensors["output.weight"],
    }
    for layer in range(config.layers):
        theirs, prefix = f"layers.{layer}.", f"model.layers.{layer}."
        if f"{theirs}attention.wqkv1.weight" in tensors:
            q, k, v, up, gate = tensors[f"{theirs}attention.wqkv1.weight"].split([*sizes, ffn, ffn])
            parts = {
                "self_attn.o_proj": "attention.wo",
                "mlp.down_proj": "attention.w2",
                "input_layernorm": "attention_norm",
            }
        else:
            q, k, v = tensors[f"{theirs}attention.wqkv.weight"].split(sizes)
            up, gate = tensors[f"{theirs}feed_forward.w1.weight"].split([ffn, ffn])
            parts = {
                "self_attn.o_proj": "attention.wo",
                "mlp.down_proj": "feed_forward.w2",
                "input_layernorm": "attention_norm",
                "post_attention_layernorm": "ffn_norm",
            }
        ours |= {
            f"{prefix}self_attn.q_proj.weight": half_split(q, config.heads),
            f"{prefix}self_attn.k_proj.weight": half_split(k, config.kv_heads),
            f"{prefix}self_attn.v_proj.weight": v,
            f"{prefix}mlp.gate_proj.weight": gate,
            f"{prefix}mlp.up_proj.weight": up,
        }
        ours |= {f"{prefix}{o}.weight": tensors[f"{theirs}{t}.weight"] for o, t in parts.items()}
    return ours

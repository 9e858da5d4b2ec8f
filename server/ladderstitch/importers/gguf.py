"""Import of Llama-architecture GGUF files, dequantised, and of gpt-fast's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from ladderstitch.errors import DataError
from ladderstitch.runtime import ProgressCallback
from ladderstitch.text.bundle import TextManifest, write_manifest
from ladderstitch.text.model.config import LlamaConfig
from ladderstitch.text.model.weight_reader import SINGLE

CONTROL, USER_DEFINED = 3, 4
"""GGUF's types of tokens that byte-pair merging never produces."""

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Tensor of a layer in GGUF -> in the Hugging Face layout."""

OTHER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
"""Tensor outside the layers in GGUF -> in the Hugging Face layout."""

PRE_TOKENIZERS: dict[str, Callable[[], list[Any]]] = {
    "smollm": lambda: [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "gpt-2": lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False)],
}
"""Steps that split text before byte-pair merging, by the file's `tokenizer.ggml.pre`."""


def import_gguf(
    file: Path,
    into: Path,
    *,
    name: str,
    origin: str,
    licence: str,
    on_progress: ProgressCallback = lambda done, total: None,
) -> None:
    """Write the model of a GGUF file as a bundle in float32.

    Raises `DataError` if the file is not GGUF or has another architecture or tokenizer.
    """
    fields, reader = _read_file(file)
    config = _read_config(fields, reader)
    into.mkdir(parents=True, exist_ok=True)
    (into / "quality.json").unlink(missing_ok=True)  # of a model that was here before
    _build_tokenizer(fields).save(str(into / "tokenizer.json"))
    tensors = {}
    for done, tensor in enumerate(reader.tensors):
        ours = _bundle_name(tensor.name)
        tensors[ours] = _dequantise(ours, tensor, config)
        on_progress(done + 1, len(reader.tensors))
    save_file(tensors, into / SINGLE)
    manifest = TextManifest(
        name=name,
        config=config,
        end_tokens=(int(fields["tokenizer.ggml.eos_token_id"]),),
        chat_template=fields.get("tokenizer.chat_template"),
        origin=origin,
        licence=licence,
    )
    write_manifest(into, manifest)


def _read_file(file: Path) -> tuple[dict[str, Any], GGUFReader]:
    try:
        reader = GGUFReader(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not a GGUF file: {error}") from error
    fields = {key: field.contents() for key, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        got = fields.get("general.architecture")
        raise DataError(f"{file}: general.architecture: expected 'llama', got {got!r}")
    return fields, reader


def _read_config(fields: dict[str, Any], reader: GGUFReader) -> LlamaConfig:
    heads, width = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=width,
        intermediate_size=fields["llama.feed_forward_length"],
        layers=fields["llama.block_count"],
        heads=heads,
        kv_heads=fields.get("llama.attention.head_count_kv", heads),
        head_dim=fields.get("llama.attention.key_length", width // heads),
        max_positions=fields["llama.context_length"],
        # stored as float32, but the original value is a short decimal
        norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_theta=fields.get("llama.rope.freq_base", 10_000.0),
        tied_head=all(tensor.name != "output.weight" for tensor in reader.tensors),
    )


def _bundle_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OTHER_NAMES:
        return f"{OTHER_NAMES[stem]}.weight"
    _, layer, part = stem.split(".", 2)
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"


def _dequantise(name: str, tensor: Any, config: LlamaConfig) -> Tensor:
    values = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
    if name.endswith("q_proj.weight"):
        return half_split(values, config.heads).contiguous()
    if name.endswith("k_proj.weight"):
        return half_split(values, config.kv_heads).contiguous()
    return values.contiguous()


def _build_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    kind, pre = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise DataError(
            f"tokenizer.ggml: expected gpt2 with one of {sorted(PRE_TOKENIZERS)}, got {kind}, {pre}"
        )
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges", ())]
    bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre]())
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    special = [
        AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_special_tokens(special)
    return tokenizer


def half_split(rows: Tensor, heads: int) -> Tensor:
    """Return the rows [H d, ...] of a query or key matrix in the order that `llama.rotate` expects.

    The given rows are for rotations of adjacent pairs (2i, 2i + 1); the result is for rotations of
    the pairs (i, i + d/2).
    """
    width = rows.shape[0] // heads
    pairs = rows.reshape(heads, width // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def gpt_fast_config(args: Mapping[str, Any]) -> LlamaConfig:
    """Return the configuration in gpt-fast's `ModelArgs`."""
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
    """Return gpt-fast's tensors in the Hugging Face layout.

    gpt-fast fuses `wqkv` and `w1` = [up; gate], and in parallel layers all five in `wqkv1`.
    """
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

"""Import of Llama-architecture GGUF files, dequantised, and of gpt-fast's weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from ladderstitch.bundles import check_tensors
from ladderstitch.errors import DataError
from ladderstitch.importers.gguf_tokenizers import build_tokenizer, read_token_id, read_tokens
from ladderstitch.runtime import ProgressCallback
from ladderstitch.text.bundle import write_tokenizer
from ladderstitch.text.manifest import TextManifest, write_manifest
from ladderstitch.text.model.config import DecoderConfig, RopeScaling
from ladderstitch.text.model.rotation import rotation_tables
from ladderstitch.text.model.weight_reader import SINGLE
from ladderstitch.text.model.weights import expected_shapes
from ladderstitch.text.tokenizer_files import TOKENIZER

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

HEAD, ROPE_FACTORS = "output.weight", "rope_freqs.weight"
"""Tensors that a file may lack: the head, and divisors of the rotary frequencies."""

SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "layers": "block_count",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_positions": "context_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
"""Field of `DecoderConfig` -> field of the file, below `llama`."""

KNOWN_FIELDS = {
    *SIZES.values(),
    "attention.value_length",
    "rope.dimension_count",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
}
"""Fields below `llama` that this import reads, or that do not change what a model computes."""

NEUTRAL = {"attention.causal": True, "rope.scaling.attn_factor": 1.0}
"""Values of other fields below `llama` that have no effect, like 0 and empty values."""

LLAMA3_FREQUENCIES = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""Settings of Llama 3.1 to 3.3; files have only the divisors that follow from them."""

END_ROLES = ("eos", "eot", "eom")
"""Roles of the tokens that end an answer: end of sequence, of turn and of message."""


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

    Nothing is written unless the whole file is valid. Raises `DataError` if the file is damaged or
    has another architecture, tokenizer or type of tensor, `BundleError` if tensors are missing or
    of another shape.
    """
    fields, reader = _read_file(file)
    try:
        config = _read_config(fields, {tensor.name: tensor for tensor in reader.tensors})
        tokenizer = build_tokenizer(fields)
        ends = [read_token_id(fields, role) for role in END_ROLES]
        if ends[0] is None:
            raise DataError("tokenizer.ggml.eos_token_id: expected a token id, got none")
        manifest = TextManifest(
            name=name,
            config=config,
            end_tokens=tuple(dict.fromkeys(end for end in ends if end is not None)),
            chat_template=fields.get("tokenizer.chat_template"),
            special_tokens=_read_special_tokens(fields),
            origin=origin,
            licence=licence,
        )
    except (DataError, ValidationError) as error:
        raise DataError(f"{file}: {error}") from error
    tensors = _read_tensors(file, reader, config, on_progress)
    into.mkdir(parents=True, exist_ok=True)
    (into / "quality.json").unlink(missing_ok=True)  # of a model that was here before
    tokenizer.save(str(into / TOKENIZER))
    write_tokenizer(into, into / TOKENIZER, manifest)
    save_file(tensors, into / SINGLE)
    write_manifest(into, manifest)


def _read_special_tokens(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens that a chat template may name."""
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown"}
    tokens, ids = read_tokens(fields), {k: read_token_id(fields, v) for k, v in roles.items()}
    return {name: tokens[number] for name, number in ids.items() if number is not None}


class _BoundedReader(GGUFReader):
    """A reader that does not read past the end of the file, whatever lengths the file has."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        values = super()._get(offset, dtype, count, override_order)
        if len(values) < count:
            raise ValueError(f"expected more than {len(self.data)} bytes")
        return values


def _read_file(file: Path) -> tuple[dict[str, Any], GGUFReader]:
    """Return the fields and tensors of a file; raises `DataError` if it is unreadable."""
    try:
        reader = _BoundedReader(file)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # the library raises errors of any kind for damaged files
        raise DataError(f"{file}: not a GGUF file, or damaged: {error}") from error
    for field, expected in (("general.architecture", "llama"), ("split.count", 1)):
        got = fields.get(field, expected if field == "split.count" else None)
        if got != expected:
            raise DataError(f"{file}: {field}: expected {expected!r}, got {got!r}")
    if reader.byte_order == "S":
        raise DataError(f"{file}: byte order: expected that of this machine, got the opposite")
    return fields, reader


def _read_config(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> DecoderConfig:
    """Return the sizes in the fields; raises `DataError` naming the field that does not fit."""
    sizes = _read_sizes(fields, tensors)
    for name, value in sorted(fields.items()):
        field = name.removeprefix("llama.")
        unknown = field != name and field not in KNOWN_FIELDS
        if unknown and value and value != NEUTRAL.get(field):
            raise DataError(f"{name}: expected none, got {str(value)[:40]}")
    for field in ("attention.value_length", "rope.dimension_count"):
        if (got := fields.get(f"llama.{field}", sizes["head_dim"])) != sizes["head_dim"]:
            raise DataError(f"llama.{field}: expected {sizes['head_dim']}, got {got!r}")
    vocabulary = len(read_tokens(fields))
    config = DecoderConfig(**sizes, vocab_size=vocabulary, tied_head=HEAD not in tensors)
    scaling = _read_linear_scaling(fields)
    if ROPE_FACTORS in tensors:
        if scaling is not None:
            raise DataError(f"llama.rope.scaling: expected none with {ROPE_FACTORS}, got linear")
        return _match_rope_factors(config, tensors[ROPE_FACTORS])
    return config.model_copy(update={"rope_scaling": scaling})


def _read_sizes(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of `SIZES`; raises `DataError` naming a field that is missing or wrong."""
    sizes: dict[str, Any] = {o: fields.get(f"llama.{t}") for o, t in SIZES.items()}
    heads, width = sizes["heads"], sizes["hidden_size"]
    defaults = {"kv_heads": heads, "rope_theta": 10_000.0}
    if isinstance(heads, int) and isinstance(width, int) and heads > 0:
        defaults["head_dim"] = width // heads
    for ours, theirs in SIZES.items():
        value: Any = defaults.get(ours) if sizes[ours] is None else sizes[ours]
        kind = float if ours in ("norm_eps", "rope_theta") else int
        if not isinstance(value, kind) or not 0 < value < float("inf"):
            got = "none" if value is None else repr(value)[:40]
            raise DataError(f"llama.{theirs}: expected a positive {kind.__name__}, got {got}")
        sizes[ours] = value
    if sizes["layers"] > len(tensors):
        layers = sizes["layers"]
        raise DataError(f"llama.block_count: expected at most {len(tensors)}, got {layers}")
    # stored as float32, but the original value is a short decimal
    sizes["norm_eps"] = float(f"{sizes['norm_eps']:.6g}")
    return sizes


def _read_linear_scaling(fields: Mapping[str, Any]) -> RopeScaling | None:
    """Return the linear scaling of positions; raises `DataError` naming any other kind."""
    kind = fields.get("llama.rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise DataError(f"llama.rope.scaling.type: expected none or linear, got {kind!r}")
    factor = fields.get("llama.rope.scaling.factor") or fields.get("llama.rope.scale_linear")
    if kind == "none" or not factor or factor == 1:
        return None
    return RopeScaling(kind="linear", factor=factor)


def _match_rope_factors(config: DecoderConfig, tensor: Any) -> DecoderConfig:
    """Return the configuration whose rotary frequencies are divided by the factors of a tensor.

    Raises `DataError` unless the factors are 1, or those of Llama 3.1 to 3.3.
    """
    factors = torch.from_numpy(_dequantise(tensor)).double()
    if tuple(factors.shape) != (config.head_dim // 2,):
        shape = tuple(factors.shape)
        raise DataError(f"{ROPE_FACTORS}: expected {(config.head_dim // 2,)}, got {shape}")
    if (factors == 1).all():
        return config
    factor = max(float(factors.max()), 1.0)
    scaling = RopeScaling(kind="llama3", factor=factor, **LLAMA3_FREQUENCIES)
    scaled = config.model_copy(update={"rope_scaling": scaling})
    frequencies, slower = (
        rotation_tables(c, positions=2)[1][1, config.head_dim // 2 :].double().asin()
        for c in (config, scaled)
    )
    if not torch.allclose(slower * factors, frequencies, rtol=1e-5, atol=0):
        raise DataError(f"{ROPE_FACTORS}: expected the factors of Llama 3.1, got others")
    return scaled


def _read_tensors(
    file: Path, reader: GGUFReader, config: DecoderConfig, on_progress: ProgressCallback
) -> dict[str, Tensor]:
    """Return all tensors in float32, by their names in the bundle.

    Raises `BundleError` naming tensors that are missing, unknown or of another shape, `DataError`
    for a type that cannot be dequantised.
    """
    shapes, names = expected_shapes(config), _bundle_names(config.layers)
    tensors = [tensor for tensor in reader.tensors if tensor.name != ROPE_FACTORS]
    check_tensors(
        {theirs: shapes[ours] for theirs, ours in names.items() if ours in shapes},
        {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in tensors},
        where=str(file),
    )
    heads = {"q_proj.weight": config.heads, "k_proj.weight": config.kv_heads}
    read = {}
    for done, tensor in enumerate(tensors):
        try:
            values = torch.from_numpy(_dequantise(tensor))
        except DataError as error:
            raise DataError(f"{file}: {error}") from error
        ours = names[tensor.name]
        if (count := heads.get(ours.rpartition("self_attn.")[2])) is not None:
            values = half_split(values, count)
        read[ours] = values.contiguous()
        on_progress(done + 1, len(tensors))
    return read


def _bundle_names(layers: int) -> dict[str, str]:
    """Return the name in the bundle of every tensor that a file may have."""
    names = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in OTHER_NAMES.items()}
    for layer in range(layers):
        theirs, ours = f"blk.{layer}.", f"model.layers.{layer}."
        names |= {f"{theirs}{t}.weight": f"{ours}{o}.weight" for t, o in LAYER_NAMES.items()}
    return names


def _dequantise(tensor: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a tensor's values in float32.

    Raises `DataError` if its type cannot be dequantised, or if values are not finite.
    """
    try:
        with np.errstate(all="ignore"):
            values = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
    except (NotImplementedError, ValueError, TypeError) as error:
        got = tensor.tensor_type.name
        raise DataError(
            f"{tensor.name}: type: expected F32, F16, BF16, Q8_0, Q4_K or a similar one, got {got}"
        ) from error
    if not np.isfinite(values).all():
        raise DataError(f"{tensor.name}: expected finite numbers, got infinity or NaN")
    return values


def half_split(rows: Tensor, heads: int) -> Tensor:
    """Return the rows [H d, ...] of a query or key matrix in the order that `llama.rotate` expects.

    The given rows are for rotations of adjacent pairs (2i, 2i + 1); the result is for rotations of
    the pairs (i, i + d/2).
    """
    width = rows.shape[0] // heads
    pairs = rows.reshape(heads, width // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def gpt_fast_config(args: Mapping[str, Any]) -> DecoderConfig:
    """Return the configuration in gpt-fast's `ModelArgs`."""
    return DecoderConfig(
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


def from_gpt_fast(tensors: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
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

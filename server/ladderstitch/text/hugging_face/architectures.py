"""Architectures of transformers: from the fields of `config.json` to a configuration and a layout.

A function per architecture returns what differs from Llama. All of them share one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ladderstitch.errors import ConfigError
from ladderstitch.text.hugging_face.fields import Fields
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.layout import TensorLayout
from ladderstitch.text.model.residual import ResidualScheme

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""Names of activations in transformers -> `DecoderConfig.activation`."""
DEFAULT_POSITIONS = {"falcon": 2048}
"""Longest sequence of architectures that may lack `max_position_embeddings`."""
SLIDING, FULL = "sliding_attention", "full_attention"
LLAMA, STANDARD = TensorLayout(), ResidualScheme()


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model as data: its configuration, how its tensors are stored, and its residual scheme."""

    config: DecoderConfig
    layout: TensorLayout = LLAMA
    residual: ResidualScheme = STANDARD


@dataclass(frozen=True, slots=True)
class Differences:
    """What distinguishes an architecture from Llama; `rope` names the layers of its main base."""

    config: Mapping[str, Any]
    layout: TensorLayout = LLAMA
    residual: ResidualScheme = STANDARD
    tied: bool = False
    """Whether head and embedding are one if `config.json` does not say it."""
    rope: str | None = None


def read_architecture(raw: Mapping[str, Any]) -> Architecture:
    """Return the architecture that a `config.json` describes.

    Raises `ConfigError` naming the field for an architecture that is not supported, and for fields
    that are missing, wrong or unknown.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in READERS:
        raise ConfigError(
            f"config.json: model_type: expected one of {', '.join(READERS)}, got {kind!r}"
        )
    fields = Fields(raw)
    fields.expect("quantization_config")
    sizes = _read_sizes(fields, DEFAULT_POSITIONS.get(kind, 0))
    differences = READERS[kind](fields, sizes)
    rope = fields.rope(sizes["max_positions"], differences.rope)
    merged = sizes | {"tied_head": fields.get("tie_word_embeddings", differences.tied)}
    merged |= {"rope_theta": rope["rope_theta"], "rope_scaling": rope["scaling"]}
    merged |= differences.config
    if rope["share"] != 1.0 and "rotary_dim" not in merged:
        merged["rotary_dim"] = int(merged["head_dim"] * rope["share"])
    fields.check_all_read()
    try:
        config = DecoderConfig(**merged)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ConfigError(f"config.json: {where}: {problem['msg']}") from error
    return Architecture(config, differences.layout, differences.residual)


def _read_sizes(fields: Fields, default_positions: int) -> dict[str, Any]:
    heads, width = fields.size("num_attention_heads"), fields.size("hidden_size")
    default_positions = fields.get("max_position_embeddings", default_positions)
    sizes = {
        "vocab_size": fields.size("vocab_size"),
        "hidden_size": width,
        "layers": fields.size("num_hidden_layers"),
        "heads": heads,
        "kv_heads": fields.get("num_key_value_heads", heads),
        "head_dim": fields.get("head_dim", width // heads),
        "max_positions": default_positions or fields.size("max_position_embeddings"),
        "intermediate_size": fields.get("intermediate_size", 4 * width),
    }
    eps = fields.get("rms_norm_eps", 0.0) or fields.get("layer_norm_eps", 0.0)
    return sizes | {"norm_eps": eps or fields.get("layer_norm_epsilon", 1e-5)}


def _activation(fields: Fields, name: str = "hidden_act", default: str = "silu") -> str:
    given = fields.get(name, default)
    if given not in ACTIVATIONS:
        raise ConfigError(f"config.json: {name}: expected {', '.join(ACTIVATIONS)}, got {given!r}")
    return ACTIVATIONS[given]


def _windows(
    fields: Fields, layers: int, default: Callable[[int], bool] = lambda layer: False
) -> dict[str, Any]:
    """Return the window and the layers that have it: by `layer_types`, else by `default`."""
    window = fields.get("sliding_window", 0)
    kinds: Sequence[str] = fields.get("layer_types", [])
    if kinds and len(kinds) != layers:
        raise ConfigError(f"config.json: layer_types: expected {layers}, got {len(kinds)}")
    if unknown := set(kinds) - {SLIDING, FULL}:
        raise ConfigError(f"config.json: layer_types: expected {SLIDING} or {FULL}, got {unknown}")
    chosen = [n for n in range(layers) if (kinds[n] == SLIDING if kinds else default(n))]
    return {"window": window, "windowed_layers": tuple(chosen)} if window and chosen else {}


def _llama(fields: Fields, sizes: dict[str, Any]) -> Differences:
    fields.expect("rope_interleaved", False)
    bias = fields.get("attention_bias", False)
    own = {
        "activation": _activation(fields),
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": fields.get("mlp_bias", False),
    }
    return Differences(own)


def _mistral(fields: Fields, sizes: dict[str, Any]) -> Differences:
    windows = _windows(fields, sizes["layers"], lambda layer: True)
    return Differences({"activation": _activation(fields), **windows})


def _qwen2(fields: Fields, sizes: dict[str, Any]) -> Differences:
    return Differences(
        {"activation": _activation(fields), "qkv_bias": True, **_qwen_windows(fields, sizes)}
    )


def _qwen3(fields: Fields, sizes: dict[str, Any]) -> Differences:
    bias = fields.get("attention_bias", False)
    own = {
        "activation": _activation(fields),
        "qk_norm": "head",
        "qkv_bias": bias,
        "output_bias": bias,
        "head_dim": fields.get("head_dim", 128),
    }
    return Differences(own | _qwen_windows(fields, sizes))


def _qwen_windows(fields: Fields, sizes: dict[str, Any]) -> dict[str, Any]:
    fields.expect("use_mrope", False)
    first = fields.get("max_window_layers", sizes["layers"])
    windows = _windows(fields, sizes["layers"], lambda layer: layer >= first)
    return windows if fields.get("use_sliding_window", False) else {}


def _gemma2(fields: Fields, sizes: dict[str, Any]) -> Differences:
    own = _gemma(fields, sizes) | _windows(fields, sizes["layers"], lambda layer: layer % 2 == 0)
    return Differences(own, _gemma_layout(fields), tied=True)


def _gemma3(fields: Fields, sizes: dict[str, Any]) -> Differences:
    fields.expect("use_bidirectional_attention", False)
    pattern = fields.get("sliding_window_pattern", 6)
    own = _gemma(fields, sizes) | {"qk_norm": "head"}
    windows = _windows(fields, sizes["layers"], lambda layer: bool((layer + 1) % pattern))
    local = fields.get("rope_local_base_freq", 10_000.0)
    by_kind: dict[str, Any] = fields.get("rope_parameters", {})
    if SLIDING in by_kind:
        local = fields.rope(sizes["max_positions"], SLIDING)["rope_theta"]
    if windows:
        windows["windowed_rope_theta"] = local
    return Differences(own | windows, _gemma_layout(fields), tied=True, rope=FULL)


def _gemma(fields: Fields, sizes: dict[str, Any]) -> dict[str, Any]:
    fields.expect("attention_bias", False)
    fields.expect("hidden_act", "gelu_pytorch_tanh", "gelu")  # the field that counts follows
    own = {
        "activation": _activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        "norm_place": "both",
        "embedding_scale": sizes["hidden_size"] ** 0.5,
        "head_dim": fields.get("head_dim", 256),
    }
    caps = {
        "attn_logit_softcapping": "attention_softcap",
        "final_logit_softcapping": "logit_softcap",
    }
    return own | {ours: fields.get(hf, 0.0) or None for hf, ours in caps.items()}


def _gemma_layout(fields: Fields) -> TensorLayout:
    scale = fields.size("query_pre_attn_scalar") ** -0.5
    return TensorLayout(names="gemma", norm_offset=1.0, attention_scale=scale)


def _phi3(fields: Fields, sizes: dict[str, Any]) -> Differences:
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
        fields.expect(name, False)
    for name in ("full_attn_mod", "interpolate_factor"):
        fields.expect(name, 1)
    windows = _windows(fields, sizes["layers"], lambda layer: True)
    own = {"activation": _activation(fields), **windows}
    return Differences(own, TensorLayout(names="phi3"))


def _olmo2(fields: Fields, sizes: dict[str, Any]) -> Differences:
    fields.expect("attention_bias", False)
    own = {"activation": _activation(fields), "norm_place": "after", "qk_norm": "all"}
    return Differences(own, TensorLayout(names="gemma"))


def _smollm3(fields: Fields, sizes: dict[str, Any]) -> Differences:
    layers, every = sizes["layers"], fields.get("no_rope_layer_interval", 4)
    rotated = fields.get("no_rope_layers", [int(bool((n + 1) % every)) for n in range(layers)])
    if len(rotated) != layers:
        raise ConfigError(f"config.json: no_rope_layers: expected {layers}, got {len(rotated)}")
    windows = _windows(fields, layers)
    fields.skip("max_window_layers")  # `layer_types` says the same
    windows = windows if fields.get("use_sliding_window", False) else {}
    still = {"unrotated_layers": tuple(n for n in range(layers) if not rotated[n])}
    return Differences(dict(_llama(fields, sizes).config) | still | windows, tied=True)


def _granite(fields: Fields, sizes: dict[str, Any]) -> Differences:
    own = {
        "embedding_scale": fields.get("embedding_multiplier", 1.0),
        "logit_scale": 1 / fields.get("logits_scaling", 1.0),
    }
    layout = TensorLayout(
        attention_scale=fields.get("attention_multiplier", 1.0),
        residual_scale=fields.get("residual_multiplier", 1.0),
    )
    return Differences(dict(_llama(fields, sizes).config) | own, layout)


def _cohere(fields: Fields, sizes: dict[str, Any]) -> Differences:
    fields.expect("use_qk_norm", False)
    bias = fields.get("attention_bias", False)
    own = {
        "activation": _activation(fields),
        "norm": "layer",
        "qkv_bias": bias,
        "output_bias": bias,
        "logit_scale": fields.get("logit_scale", 0.0625),
    }
    layout, parallel = TensorLayout(interleaved=True), ResidualScheme(scheme="parallel")
    return Differences(own, layout, parallel, tied=True)


def _gpt_neox(fields: Fields, sizes: dict[str, Any]) -> Differences:
    bias, parallel = fields.get("attention_bias", True), fields.get("use_parallel_residual", True)
    own: dict[str, Any] = {
        "activation": _activation(fields, default="gelu"),
        "gated": False,
        "norm": "layer",
        "norm_bias": True,
        "mlp_bias": True,
        "qkv_bias": bias,
        "output_bias": bias,
        "parallel_norms": 2,
    }
    if (base := fields.get("rotary_emb_base", 0.0)) and not fields.get("rope_parameters", {}):
        own["rope_theta"] = base
    share = fields.get("rotary_pct", 0.0)
    share = share or fields.rope(sizes["max_positions"])["share"]
    own["rotary_dim"] = int(sizes["head_dim"] * share)
    scheme = ResidualScheme(scheme="parallel" if parallel else "standard")
    return Differences(own, TensorLayout(names="gpt_neox", fused_qkv="heads"), scheme)


def _falcon(fields: Fields, sizes: dict[str, Any]) -> Differences:
    for name in ("alibi", "apply_residual_connection_post_layernorm"):
        fields.expect(name, False)
    heads, bias, grouped = (
        sizes["heads"],
        fields.get("bias", False),
        fields.get("new_decoder_architecture", False),
    )
    multi_query, kv_heads = fields.get("multi_query", True), fields.get("num_kv_heads", heads)
    parallel = fields.get("parallel_attn", True) or grouped
    norms = fields.get("num_ln_in_parallel_attn", 2 if grouped else 1)
    own = {
        "activation": _activation(fields, "activation", "gelu"),
        "intermediate_size": fields.get("ffn_hidden_size", 4 * sizes["hidden_size"]),
        "kv_heads": kv_heads if grouped else 1 if multi_query else heads,
        "gated": False,
        "norm": "layer",
        "norm_bias": True,
        "mlp_bias": bias,
        "qkv_bias": bias,
        "output_bias": bias,
        "parallel_norms": 2 if grouped and norms == 2 else 1,
    }
    names = "falcon_two_norms" if own["parallel_norms"] == 2 else "falcon"
    fused = "groups" if grouped else "blocks" if multi_query else "heads"
    scheme = ResidualScheme(scheme="parallel" if parallel else "standard")
    layout = TensorLayout.model_validate({"names": names, "fused_qkv": fused})
    return Differences(own, layout, scheme, tied=True)


READERS: dict[str, Callable[[Fields, dict[str, Any]], Differences]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "smollm3": _smollm3,
    "granite": _granite,
    "cohere": _cohere,
    "gpt_neox": _gpt_neox,
    "falcon": _falcon,
}
"""The architectures by `model_type`."""

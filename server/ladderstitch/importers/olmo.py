"""Models of MatFormer-OLMo: OLMo with nested MLPs, from its own configuration and tensors.

The repository RAIVNLab/MatFormer-OLMo trains each MLP at all widths h, h/2, h/4 and h/8 at once, so
that the first columns are an MLP of their own. Attention is not nested: all widths write the same
keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ladderstitch.errors import ConfigError
from ladderstitch.text.hugging_face.architectures import Architecture
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.layout import TensorLayout

FACTORS = (8, 4, 2)
"""Divisors of the widest MLP that MatFormer-OLMo trains, from the narrowest on."""
EXPECTED: dict[str, tuple[object, ...]] = {
    "activation_type": ("gelu",),
    "block_type": ("sequential",),
    "alibi": (True,),
    "rope": (False,),
    "attention_layer_norm": (False,),
    "layer_norm_type": ("default",),
    "weight_tying": (True, None),
}
"""Fields with a single supported value; a field may be missing where None is among the values."""


def read_olmo(fields: Mapping[str, Any]) -> Architecture:
    """Return the architecture that the `model` section of a `config.yaml` describes.

    Raises `ConfigError` naming the field that is missing, wrong or not supported.
    """
    for name, values in EXPECTED.items():
        if fields.get(name) not in values:
            raise ConfigError(f"model.{name}: expected {values[0]}, got {fields.get(name)!r}")
    width, heads, ratio = (_number(fields, n) for n in ("d_model", "n_heads", "mlp_ratio"))
    has_bias, widest = bool(fields.get("include_bias", True)), width * ratio
    try:
        config = DecoderConfig(
            vocab_size=fields.get("embedding_size") or _number(fields, "vocab_size"),
            hidden_size=width,
            intermediate_size=widest,
            layers=_number(fields, "n_layers"),
            heads=heads,
            kv_heads=1 if fields.get("multi_query_attention") else heads,
            head_dim=width // heads,
            max_positions=_number(fields, "max_sequence_length"),
            tied_head=True,
            norm="layer",
            norm_bias=has_bias,
            qkv_bias=has_bias,
            output_bias=has_bias,
            mlp_bias=has_bias,
            activation="gelu",
            gated=False,
            alibi_bias_max=fields.get("alibi_bias_max", 8.0),
            nested_ffn=tuple(widest // factor for factor in FACTORS),
        )
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(("model", *map(str, problem["loc"])))
        raise ConfigError(f"{where}: {problem['msg']}") from error
    return Architecture(config, TensorLayout(names="olmo"))


def _number(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if type(value) is not int or value < 1:
        raise ConfigError(f"model.{name}: expected a number of at least 1, got {value!r}")
    return value

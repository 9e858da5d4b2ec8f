"""The configuration of a Llama-architecture language model: sizes, norms and rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ladderstitch.errors import ConfigError

HF_NAMES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied_head",
}
"""Field of Hugging Face's `config.json` -> field of `LlamaConfig`."""


MAX_SIZE = 1 << 24
"""Largest size of a model in any dimension: a manifest with a larger one is wrong."""


class RopeScaling(BaseModel):
    """Slower rotary frequencies for longer contexts.

    `linear` is position interpolation (arXiv 2306.15595): all frequencies are divided by `factor`.
    `llama3` divides those that turn at most `low_freq_factor` times within
    `original_max_positions`, keeps those that turn at least `high_freq_factor` times and
    interpolates between the two.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["linear", "llama3"]
    factor: float = Field(gt=0)
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)
    original_max_positions: int = Field(8192, gt=0)


class LlamaConfig(BaseModel):
    """Sizes of a model with Llama's parts: grouped-query attention, RoPE, SwiGLU and RMSNorm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = Field(gt=0, le=MAX_SIZE)
    hidden_size: int = Field(gt=0, le=MAX_SIZE)
    intermediate_size: int = Field(gt=0, le=MAX_SIZE)
    layers: int = Field(gt=0, le=1000)
    heads: int = Field(gt=0, le=MAX_SIZE)
    kv_heads: int = Field(gt=0, le=MAX_SIZE)
    head_dim: int = Field(gt=0, le=MAX_SIZE)
    max_positions: int = Field(gt=0, le=MAX_SIZE)
    norm_eps: float = Field(1e-5, gt=0)
    rope_theta: float = Field(10_000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    tied_head: bool = False

    @model_validator(mode="after")
    def _check_heads(self) -> LlamaConfig:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of {self.heads}, got {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, got {self.head_dim}")
        return self

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> LlamaConfig:
        """Return the configuration in the fields of a Hugging Face `config.json`.

        Raises `ConfigError` naming the field if it is missing or not of the Llama architecture.
        """
        for field, only in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
            if fields.get(field, only) != only:
                raise ConfigError(f"{field}: expected {only!r}, got {fields[field]!r}")
        ours = {o: fields[hf] for hf, o in HF_NAMES.items() if fields.get(hf) is not None}
        try:
            ours.setdefault("kv_heads", ours["heads"])
            ours.setdefault("head_dim", ours["hidden_size"] // ours["heads"])
            rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
            ours["rope_theta"] = rope.get("rope_theta", fields.get("rope_theta", 10_000.0))
            return cls(**ours, rope_scaling=_rope_scaling(rope))
        except KeyError as error:
            raise ConfigError(f"config.json: expected the field {error}") from error
        except ValidationError as error:
            raise ConfigError(f"config.json: {error}") from error


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise ConfigError(f"rope_scaling: expected default, linear or llama3, got {kind!r}")
    names = {"original_max_position_embeddings": "original_max_positions"}
    names |= {name: name for name in ("factor", "low_freq_factor", "high_freq_factor")}
    return RopeScaling(kind=kind, **{ours: rope[hf] for hf, ours in names.items() if hf in rope})

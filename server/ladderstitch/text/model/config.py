"""The configuration of a decoder language model: sizes, and where it differs from Llama."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_SIZE = 1 << 24
"""Largest size of a model in any dimension: a manifest with a larger one is wrong."""


class RopeScaling(BaseModel):
    """Rotary frequencies for longer contexts than the model was trained for first.

    `linear` is position interpolation (arXiv 2306.15595): all frequencies are divided by `factor`.
    `llama3` divides those that turn at most `low_freq_factor` times within
    `original_max_positions`, keeps those that turn at least `high_freq_factor` times and
    interpolates between the two. `yarn` (arXiv 2309.00071) does so between `beta_slow` and
    `beta_fast` turns. `longrope` (arXiv 2402.13753) divides each frequency by a factor of its own:
    by `short_factors` if no answer may exceed `original_max_positions`, else by `long_factors`.
    `attention_factor` multiplies cosines and sines.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float = Field(gt=0)
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)
    original_max_positions: int = Field(8192, gt=0)
    beta_fast: float = Field(32.0, gt=0)
    beta_slow: float = Field(1.0, gt=0)
    truncate: bool = True
    attention_factor: float = Field(1.0, gt=0)
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


class DecoderConfig(BaseModel):
    """Sizes of a decoder, and how its layers differ from Llama's.

    The defaults are Llama's: grouped-query attention, RoPE, SwiGLU, and RMSNorm before each
    sub-block.
    """

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
    norm: Literal["rms", "layer"] = Field("rms", description="RMSNorm or LayerNorm")
    norm_place: Literal["before", "after", "both"] = Field(
        "before", description="norms before a sub-block, of its output, or both"
    )
    parallel_norms: Literal[1, 2] = Field(
        1, description="norms of a layer whose attention and MLP run in parallel"
    )
    qk_norm: Literal["none", "head", "all"] = Field(
        "none", description="RMSNorm of queries and keys: of each head, or over all heads"
    )
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = Field(True, description="whether the MLP multiplies with a gate")
    embedding_scale: float = Field(1.0, gt=0)
    logit_scale: float = Field(1.0, gt=0)
    attention_softcap: float | None = Field(
        None, gt=0, description="scores are softcap * tanh(score / softcap)"
    )
    logit_softcap: float | None = Field(None, gt=0, description="the same for logits")
    rotary_dim: int | None = Field(
        None, gt=0, description="dimensions of a head that rotate; unset: all"
    )
    window: int | None = Field(
        None, gt=0, description="tokens that a token of a windowed layer sees, itself included"
    )
    windowed_layers: tuple[int, ...] = ()
    windowed_rope_theta: float | None = Field(
        None, gt=0, description="rotary base of windowed layers, unscaled; unset: as the others"
    )
    unrotated_layers: tuple[int, ...] = ()
    alibi_bias_max: float | None = Field(
        None,
        gt=0,
        description="ALiBi (arXiv 2108.12409) in place of RoPE: head i of H subtracts "
        "2 ** -(i * alibi_bias_max / H) per token of distance from its scores",
    )
    nested_ffn: tuple[int, ...] = Field(
        (),
        description="ascending widths below intermediate_size: paths may run that many of the "
        "first columns of an MLP (MatFormer, arXiv 2310.07707)",
    )

    @model_validator(mode="after")
    def _check(self) -> DecoderConfig:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of {self.heads}, got {self.kv_heads}")
        if self.head_dim % 2 or (self.rotary_dim or 0) % 2:
            got = self.head_dim if self.head_dim % 2 else self.rotary_dim
            raise ValueError(f"head_dim and rotary_dim: expected even numbers, got {got}")
        if self.rotary_dim is not None and self.rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim: expected at most {self.head_dim}, got {self.rotary_dim}")
        if self.windowed_layers and self.window is None:
            raise ValueError("window: expected a number of tokens for windowed_layers, got none")
        for name in ("windowed_layers", "unrotated_layers"):
            if wrong := [n for n in getattr(self, name) if not 0 <= n < self.layers]:
                raise ValueError(f"{name}: expected 0 to {self.layers - 1}, got {wrong}")
        widths = (0, *self.nested_ffn, self.intermediate_size)
        if any(later <= earlier for earlier, later in pairwise(widths)):
            raise ValueError(
                "nested_ffn: expected ascending widths from 1 to "
                f"{self.intermediate_size - 1}, got {list(self.nested_ffn)}"
            )
        return self

    @property
    def is_llama(self) -> bool:
        """Whether every layer is one of Llama's, which some faster code is restricted to."""
        llama = DecoderConfig(**{name: getattr(self, name) for name in LLAMA_FIELDS})
        return self == llama and self.rotations == 1

    @property
    def rotations(self) -> int:
        """The number of kinds of layers by their rotary embedding."""
        return len(set(self.layer_rotations))

    @property
    def layer_rotations(self) -> Sequence[Literal["main", "windowed", "none"]]:
        """Of each layer: the rotary embedding of the model, that of windowed layers, or none."""
        if self.alibi_bias_max is not None:
            return ["none"] * self.layers
        own = self.windowed_layers if self.windowed_rope_theta is not None else ()
        return [
            "none" if n in self.unrotated_layers else "windowed" if n in own else "main"
            for n in range(self.layers)
        ]

    def limited_to(self, positions: int) -> DecoderConfig:
        """Return the configuration of a server whose sequences have at most `positions` tokens.

        Rotary factors that depend on the length are chosen by it, once for all sequences, so that
        no cached key must be computed again.
        """
        return self.model_copy(update={"max_positions": min(positions, self.max_positions)})

    def find_width_problem(self, widths: Sequence[int]) -> str | None:
        """Return why MLPs of these widths, by layer or of all, do not fit; None if they do."""
        known = [*self.nested_ffn, self.intermediate_size]
        if len(widths) not in (0, 1, self.layers):
            return f"ffn_widths: expected 1 or {self.layers} widths, got {len(widths)}"
        if wrong := sorted(set(widths) - set(known)):
            return f"ffn_widths: expected widths of {known}, got {wrong}"
        return None

    @property
    def alibi_slopes(self) -> list[float] | None:
        """Of each query head: what its scores lose per token of distance; None without ALiBi."""
        if self.alibi_bias_max is None:
            return None
        step = self.alibi_bias_max / self.heads
        return [2.0 ** -(step * head) for head in range(1, self.heads + 1)]

    def window_of(self, layer: int) -> int | None:
        """Return how many tokens a token of a layer sees, itself included; None: all before it."""
        return self.window if layer in self.windowed_layers else None


LLAMA_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "layers",
    "heads",
    "kv_heads",
    "head_dim",
    "max_positions",
    "norm_eps",
    "rope_theta",
    "rope_scaling",
    "tied_head",
)
"""The fields in which Llama models differ from each other."""

"""How a checkpoint stores its tensors: under other names, fused, in another order, or scaled.

`LaidOutWeights` presents every layout under Llama's names, so that nothing else knows of layouts.
A norm of a sub-block's output is `attention_output_norm` or `mlp_output_norm`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.rotation import pair_order
from ladderstitch.text.model.weight_reader import EMBEDDING, HEAD, Weights

FINAL_NORM = "model.norm"
IGNORED = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")
"""Ends of the names of buffers that older checkpoints hold and no forward pass reads."""
NamesOfLayout = Literal["llama", "gemma", "phi3", "gpt_neox", "falcon", "falcon_two_norms", "olmo"]
Fused = Literal["blocks", "heads", "groups"]

OUTPUT_NORMS = {
    "attention_output_norm": "post_attention_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
}
GPT_NEOX = {
    "self_attn.qkv": "attention.query_key_value",
    "self_attn.o_proj": "attention.dense",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}
FALCON = GPT_NEOX | {
    "self_attn.qkv": "self_attention.query_key_value",
    "self_attn.o_proj": "self_attention.dense",
}
LAYER_NAMES: dict[NamesOfLayout, dict[str, str]] = {
    "llama": {},
    "gemma": OUTPUT_NORMS,
    "phi3": {"self_attn.qkv": "self_attn.qkv_proj", "mlp.gate_up": "mlp.gate_up_proj"},
    "gpt_neox": GPT_NEOX,
    "falcon": FALCON,
    "falcon_two_norms": FALCON
    | {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"},
    "olmo": {
        "self_attn.qkv": "att_proj",
        "self_attn.o_proj": "attn_out",
        "mlp.up_proj": "ff_proj",
        "mlp.down_proj": "ff_out",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ff_norm",
    },
}
"""Names of a layer's parts that differ from Llama's; `qkv` and `gate_up` are fused matrices."""
TOP_NAMES: dict[NamesOfLayout, tuple[str, str, str, str]] = {
    "gpt_neox": ("gpt_neox.layers", "gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out"),
    "falcon": ("transformer.h", "transformer.word_embeddings", "transformer.ln_f", "lm_head"),
    "olmo": (
        "transformer.blocks",
        "transformer.wte",
        "transformer.ln_f",
        "transformer.ff_out",
    ),
}
TOP_NAMES["falcon_two_norms"] = TOP_NAMES["falcon"]
"""Names of the layers, the embedding, the last norm and the head that differ from Llama's."""


class TensorLayout(BaseModel):
    """The layout of a checkpoint as data; the defaults are Llama's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    names: NamesOfLayout = "llama"
    fused_qkv: Fused = Field(
        "blocks",
        description="order of fused rows: all queries, keys, values; q, k, v of each head; or "
        "queries, key and value of each group",
    )
    interleaved: bool = Field(False, description="whether pairs (2i, 2i + 1) of a head rotate")
    norm_offset: float = Field(0.0, description="added to the weights of RMS norms")
    attention_scale: float | None = Field(
        None, gt=0, description="factor of the scores; unset: head_dim ** -0.5"
    )
    residual_scale: float = Field(1.0, gt=0, description="factor of each sub-block's output")


@dataclass(frozen=True, slots=True)
class StoredPart:
    """Where a tensor is stored: rows of a stored tensor, times a factor, plus an offset."""

    name: str
    rows: NDArray[np.int64] | None = None
    """The stored row of each row; unset: all, in order."""
    factor: float = 1.0
    offset: float = 0.0


class LaidOutWeights:
    """The tensors of a checkpoint under Llama's names, in Llama's order and scale."""

    def __init__(self, stored: Weights, layout: TensorLayout, config: DecoderConfig) -> None:
        self._stored, self.layout, self._config = stored, layout, config
        present = {name for name in stored.names() if not name.endswith(IGNORED)}
        self._parts: dict[str, StoredPart] = {}
        for name, part in self._all_parts():
            if part.name in present:
                self._parts[name] = part
        used = {part.name for part in self._parts.values()}
        self._unknown = sorted(present - used)

    def names(self) -> Sequence[str]:
        """Return the names of all tensors; those that the layout does not have under their own."""
        return [*self._parts, *self._unknown]

    @property
    def parts(self) -> Mapping[str, StoredPart]:
        """Where each tensor is stored."""
        return self._parts

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a stored tensor, by its stored name."""
        return self._stored.shape(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; raises `BundleError` if it is missing."""
        part = self._parts.get(name, StoredPart(name))
        shape = self._stored.shape(part.name)
        return shape if part.rows is None else (len(part.rows), *shape[1:])

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        """Return the given rows and columns of a tensor; unset: all of them."""
        part = self._parts.get(name, StoredPart(name))
        if part.rows is None:
            read = self._stored.read(part.name, rows, columns)
        else:
            wanted = part.rows if rows is None else part.rows[rows.start : rows.stop]
            first = int(wanted.min())
            hull = range(first, int(wanted.max()) + 1)
            read = self._stored.read(part.name, hull, columns)[wanted - first]
        if part.factor != 1.0:
            read = read.float() * part.factor
        return read if part.offset == 0.0 else read.float() + part.offset

    def _all_parts(self) -> Iterator[tuple[str, StoredPart]]:
        """Yield the place of every tensor that a model of the configuration may have."""
        config, names = self._config, self.layout.names
        layers, embedding, norm, head = TOP_NAMES.get(
            names, ("model.layers", "model.embed_tokens", FINAL_NORM, "lm_head")
        )
        yield EMBEDDING, StoredPart(f"{embedding}.weight")
        yield HEAD, StoredPart(f"{head}.weight")
        yield from self._norm(FINAL_NORM, norm)
        for layer in range(config.layers):
            ours, theirs = f"model.layers.{layer}.", f"{layers}.{layer}."
            for part in (
                "input_layernorm",
                "post_attention_layernorm",
                "attention_output_norm",
                "mlp_output_norm",
            ):
                yield from self._norm(ours + part, theirs + self._name(part))
            yield from self._attention(ours, theirs)
            yield from self._mlp(ours, theirs)

    def _name(self, part: str) -> str:
        return LAYER_NAMES[self.layout.names].get(part, part)

    def _norm(self, ours: str, theirs: str) -> Iterator[tuple[str, StoredPart]]:
        yield f"{ours}.weight", StoredPart(f"{theirs}.weight", offset=self.layout.norm_offset)
        yield f"{ours}.bias", StoredPart(f"{theirs}.bias")

    def _attention(self, ours: str, theirs: str) -> Iterator[tuple[str, StoredPart]]:
        config, layout = self._config, self.layout
        order = np.array(self._head_order())
        d, scale = config.head_dim, self._query_factor()
        normed = config.qk_norm != "none"
        for number, name in enumerate("qkv"):
            heads = config.heads if name == "q" else config.kv_heads
            lanes = np.arange(d) if name == "v" else order
            starts, stored = self._head_starts(number), theirs + self._name("self_attn.qkv")
            is_fused = "self_attn.qkv" in LAYER_NAMES[layout.names]
            if not is_fused:
                starts, stored = np.arange(heads) * d, f"{theirs}self_attn.{name}_proj"
            rows = (starts[:, None] + lanes).reshape(-1)
            factor = scale if name == "q" and not normed else 1.0
            is_whole = not is_fused and np.array_equal(rows, np.arange(heads * d))
            kept = None if is_whole else rows
            for kind in ("weight", "bias"):
                yield (
                    f"{ours}self_attn.{name}_proj.{kind}",
                    StoredPart(f"{stored}.{kind}", kept, factor),
                )
        for name in "qk":
            rows = order
            if config.qk_norm == "all":
                count = config.heads if name == "q" else config.kv_heads
                rows = (np.arange(count)[:, None] * d + order).reshape(-1)
            factor, offset = (scale if name == "q" else 1.0), layout.norm_offset
            yield (
                f"{ours}self_attn.{name}_norm.weight",
                StoredPart(f"{theirs}self_attn.{name}_norm.weight", rows, factor, offset * factor),
            )
        for kind in ("weight", "bias"):
            stored = theirs + self._name("self_attn.o_proj")
            yield (
                f"{ours}self_attn.o_proj.{kind}",
                StoredPart(f"{stored}.{kind}", factor=layout.residual_scale),
            )

    def _mlp(self, ours: str, theirs: str) -> Iterator[tuple[str, StoredPart]]:
        size, fused = self._config.intermediate_size, LAYER_NAMES[self.layout.names]
        for kind in ("weight", "bias"):
            for number, name in enumerate(("gate_proj", "up_proj")):
                part = StoredPart(f"{theirs}{self._name(f'mlp.{name}')}.{kind}")
                if "mlp.gate_up" in fused:
                    rows = np.arange(number * size, (number + 1) * size)
                    part = StoredPart(f"{theirs}{fused['mlp.gate_up']}.{kind}", rows)
                yield f"{ours}mlp.{name}.{kind}", part
            down = f"{theirs}{self._name('mlp.down_proj')}.{kind}"
            yield (
                f"{ours}mlp.down_proj.{kind}",
                StoredPart(down, factor=self.layout.residual_scale),
            )

    def _head_order(self) -> list[int]:
        config = self._config
        rotary = config.rotary_dim or config.head_dim
        return pair_order(config.head_dim, rotary, interleaved=self.layout.interleaved)

    def _query_factor(self) -> float:
        """Return the factor of queries that gives the scores their scale, with d ** -0.5."""
        scale = self.layout.attention_scale
        return 1.0 if scale is None else scale * math.sqrt(self._config.head_dim)

    def _head_starts(self, number: int) -> NDArray[np.int64]:
        """Return the first row of each query (0), key (1) or value (2) head in a fused matrix."""
        config, d = self._config, self._config.head_dim
        count = (config.heads, config.kv_heads, config.kv_heads)[number]
        heads = np.arange(count)
        match self.layout.fused_qkv:
            case "heads":
                return (3 * heads + number) * d
            case "groups":
                group = config.heads // config.kv_heads
                if number == 0:
                    return (heads // group * (group + 2) + heads % group) * d
                return (heads * (group + 2) + group + number - 1) * d
            case "blocks":
                before = (0, config.heads, config.heads + config.kv_heads)[number]
                return (before + heads) * d

"""AutoFormer (arXiv 2107.00651; microsoft/Cream, `Vision_TransformerSuper`) as a nested network.

A path chooses one width, the number of layers (the first ones run), and per layer the number of
heads and the ratio of the hidden width. With `change_qkv`, heads have a constant size and the rows
of the weights of queries, keys and values are interleaved, while their biases are contiguous.
Without it, queries, keys and values have the full width, which the number of heads only divides.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ladderstitch.vision.models.nested.paths import NestedPath, draw
from ladderstitch.vision.models.nested.sizes import TensorSizes
from ladderstitch.vision.models.nested.slices import Plan, Slices, Step
from ladderstitch.vision.models.nested.transformer_layers import HiddenLayer, PatchEmbedding
from ladderstitch.vision.models.vit import InputShape

EPS = 1e-5
Project = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""Function from tokens [B, T, D] to queries, keys and values [B, H, T, size]."""


class AutoFormerPath(NestedPath):
    """One network: its width, and heads and hidden ratios of the layers that run."""

    embed_dim: int = Field(gt=0)
    layer_num: int = Field(gt=0)
    mlp_ratio: tuple[float, ...]
    num_heads: tuple[int, ...]


class AutoFormer(BaseModel):
    """The supernet's sizes and options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["autoformer"] = "autoformer"
    patch_size: int = Field(16, gt=0)
    embed_dim: int = Field(gt=0)
    depth: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    mlp_ratio: float = Field(4.0, gt=0)
    head_dim: int = Field(64, gt=0, description="with change_qkv: size of every head")
    change_qkv: bool = True
    relative_position: bool = True
    max_relative_position: int = Field(14, gt=0)
    global_pool: bool = Field(True, description="mean of the patches, not the class token")
    embed_dims: tuple[int, ...] = Field((), description="choices of random paths")
    depths: tuple[int, ...] = Field((), description="choices of random paths")
    heads: tuple[int, ...] = Field((), description="choices of random paths, per layer")
    mlp_ratios: tuple[float, ...] = Field((), description="choices of random paths, per layer")
    paths: tuple[AutoFormerPath, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> AutoFormer:
        """Raise `ValueError` for a path that the supernet does not have."""
        for path in self.paths:
            if path.embed_dim > self.embed_dim or path.layer_num > self.depth:
                raise ValueError(
                    f"paths: expected at most {self.embed_dim} channels and {self.depth} layers, "
                    f"got {path.embed_dim} and {path.layer_num}"
                )
            for name in ("mlp_ratio", "num_heads"):
                if (got := len(getattr(path, name))) != path.layer_num:
                    raise ValueError(f"paths.{name}: expected {path.layer_num} values, got {got}")
            for ratio, heads in zip(path.mlp_ratio, path.num_heads, strict=True):
                self._check_layer(path.embed_dim, ratio, heads)
        return self

    def _check_layer(self, width: int, ratio: float, heads: int) -> None:
        hidden = int(width * ratio)
        if not 0 < hidden <= int(self.embed_dim * self.mlp_ratio):
            raise ValueError(f"paths.mlp_ratio: expected a hidden width that exists, got {hidden}")
        if self.change_qkv and not 0 < heads <= self.num_heads:
            raise ValueError(f"paths.num_heads: expected at most {self.num_heads}, got {heads}")
        if not self.change_qkv and (heads < 1 or self.embed_dim % heads):
            raise ValueError(
                f"paths.num_heads: expected a divisor of {self.embed_dim}, got {heads}"
            )

    @property
    def _inner(self) -> int:
        """Width of all heads together."""
        return self.num_heads * self.head_dim if self.change_qkv else self.embed_dim

    def sizes(self, inputs: InputShape) -> TensorSizes:
        """Return the sizes of the supernet's tensors."""
        width, inner = self.embed_dim, self._inner
        sizes = TensorSizes()
        self._embedding.add_sizes(sizes, width, inputs)
        for layer in range(self.depth):
            name = f"blocks.{layer}"
            for norm in ("attn_layer_norm", "ffn_layer_norm"):
                sizes.add_layer_norm(f"{name}.{norm}", width)
            sizes.add_linear(f"{name}.attn.qkv", 3 * inner, width)
            sizes.add_linear(f"{name}.attn.proj", width, inner)
            _hidden_layer(layer).add_sizes(sizes, width, int(width * self.mlp_ratio))
            if self.relative_position:
                rows = 2 * self.max_relative_position + 2
                for side in "kv":
                    for axis in "vh":
                        table = f"{name}.attn.rel_pos_embed_{side}.embeddings_table_{axis}"
                        sizes.add(table, rows, inner // self.num_heads)
        sizes.add_layer_norm("norm", width)
        sizes.add_linear("head", inputs.num_classes, width)
        return sizes

    @property
    def _embedding(self) -> PatchEmbedding:
        return PatchEmbedding("patch_embed_super.proj", self.patch_size)

    def plan(self, path: AutoFormerPath, slices: Slices, inputs: InputShape) -> Plan:
        """Return the functions of a path."""
        width, pools = path.embed_dim, self.global_pool
        embed = self._embedding.bind(slices, width)
        blocks = tuple(self._block(path, layer, slices, inputs) for layer in range(path.layer_num))
        norm, head = slices.layer_norm("norm", width, EPS), slices.linear("head", None, width)

        def classify(x: Tensor) -> Tensor:
            x = norm(x)
            return head(x[:, 1:].mean(1) if pools else x[:, 0])

        return Plan(embed, blocks, classify)

    def _block(self, path: AutoFormerPath, layer: int, slices: Slices, inputs: InputShape) -> Step:
        """Return one layer: attention and a hidden layer, each after its norm."""
        name, width = f"blocks.{layer}", path.embed_dim
        hidden = int(width * path.mlp_ratio[layer])
        norm = slices.layer_norm(f"{name}.attn_layer_norm", width, EPS)
        attend = self._attention(path, layer, slices, inputs)
        transform = _hidden_layer(layer).bind(slices, width, hidden, EPS)
        return lambda x: transform(x + attend(norm(x)))

    def _attention(
        self, path: AutoFormerPath, layer: int, slices: Slices, inputs: InputShape
    ) -> Step:
        """Return multi-head attention with relative positions on keys and values, if there are."""
        name, width, heads = f"blocks.{layer}.attn", path.embed_dim, path.num_heads[layer]
        inner = heads * self.head_dim if self.change_qkv else self.embed_dim
        scale = (self.head_dim if self.change_qkv else width // heads) ** -0.5
        project_qkv = self._projection(slices, f"{name}.qkv", inner, width, heads)
        project = slices.linear(f"{name}.proj", width, inner)
        if not self.relative_position:

            def attend_plain(x: Tensor) -> Tensor:
                q, k, v = project_qkv(x)
                mixed = F.scaled_dot_product_attention(q, k, v, scale=scale)
                return project(mixed.transpose(1, 2).flatten(2))

            return attend_plain
        keys = _Offsets(slices, f"{name}.rel_pos_embed_k", inner // heads, self, inputs)
        values = _Offsets(slices, f"{name}.rel_pos_embed_v", inner // heads, self, inputs)

        def attend(x: Tensor) -> Tensor:
            q, k, v = project_qkv(x)
            by_token = q.permute(2, 0, 1, 3)  # [T, B, H, size]
            offsets = by_token.flatten(1, 2) @ keys().transpose(1, 2)  # [T, B * H, T]
            offsets = offsets.unflatten(1, (-1, heads)).permute(1, 2, 0, 3)
            weights = ((q @ k.transpose(2, 3) + offsets) * scale).softmax(-1)
            by_token = weights.permute(2, 0, 1, 3)
            added = by_token.flatten(1, 2) @ values()  # [T, B * H, size]
            added = added.unflatten(1, (-1, heads)).permute(1, 2, 0, 3)
            return project((weights @ v + added).transpose(1, 2).flatten(2))

        return attend

    def _projection(self, slices: Slices, name: str, inner: int, width: int, heads: int) -> Project:
        """Return the function to queries, keys and values."""
        bias = slices.take(f"{name}.bias", 3 * inner)
        if not self.change_qkv:
            weight = slices.take(f"{name}.weight", None, width)

            def project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                split = F.linear(x, weight, bias).unflatten(2, (3, heads, inner // heads))
                q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
                return q, k, v

            return project
        rows = slices.take(f"{name}.weight", 3 * inner, width)
        parts = [(rows[i::3], bias[i * inner : (i + 1) * inner]) for i in range(3)]

        def project_each(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = (
                F.linear(x, w, b).unflatten(2, (heads, inner // heads)).transpose(1, 2)
                for w, b in parts
            )
            return q, k, v

        return project_each

    def sample(self, rng: random.Random, level: float) -> dict[str, object]:
        """Return the fields of a random path; `level` from 0 to 1 leans towards large choices."""
        depth = draw(rng, self.depths or (self.depth,), level)
        heads, ratios = self.heads or (self.num_heads,), self.mlp_ratios or (self.mlp_ratio,)
        return {
            "embed_dim": draw(rng, self.embed_dims or (self.embed_dim,), level),
            "layer_num": depth,
            "num_heads": [draw(rng, heads, level) for _ in range(depth)],
            "mlp_ratio": [draw(rng, ratios, level) for _ in range(depth)],
        }


def _hidden_layer(layer: int) -> HiddenLayer:
    name = f"blocks.{layer}"
    return HiddenLayer(f"{name}.ffn_layer_norm", f"{name}.fc1", f"{name}.fc2")


class _Offsets:
    """Embeddings [T, T, size] of relative positions: vertical plus horizontal, clipped.

    Entry 0 of both tables belongs to all pairs with the class token. They are looked up at each
    call: stored, they would take more memory than the weights.
    """

    def __init__(
        self, slices: Slices, name: str, size: int, net: AutoFormer, inputs: InputShape
    ) -> None:
        self._vertical = slices.take(f"{name}.embeddings_table_v", None, size)
        self._horizontal = slices.take(f"{name}.embeddings_table_h", None, size)
        side, device = inputs.image_size // net.patch_size, self._vertical.device
        self._rows, self._columns = _positions(side, net.max_relative_position, device)

    def __call__(self) -> Tensor:
        """Return the embeddings of all pairs (query, key)."""
        return self._vertical[self._rows] + self._horizontal[self._columns]


@lru_cache(maxsize=8)
def _positions(side: int, most: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the tables' vertical and horizontal entries [T, T] of all pairs (query, key).

    All layers and paths share them: on 197 tokens they take 0.6 MB.
    """
    place = np.arange(side * side)
    entries = []
    for position in (place // side, place % side):
        distance = np.clip(position[None] - position[:, None], -most, most) + most + 1
        padded = np.pad(distance, ((1, 0), (1, 0)))
        entries.append(torch.from_numpy(padded).to(device))
    return entries[0], entries[1]

"""ThinkingViT (arXiv 2507.10800) as a nested network: stages of more and more heads.

A path is a list of stages, each a number of heads, and the stage after which it answers. Every
stage runs all blocks on the first channels. A later stage starts from the full embedding plus a
gated, learned map of the tokens of the stage before it, so that earlier results are used again.
"""

from __future__ import annotations

import random
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ladderstitch.vision.models.nested.paths import NestedPath
from ladderstitch.vision.models.nested.sizes import TensorSizes
from ladderstitch.vision.models.nested.slices import Plan, Slices, Step
from ladderstitch.vision.models.nested.transformer_layers import (
    HiddenLayer,
    PatchEmbedding,
    SelfAttention,
)
from ladderstitch.vision.models.vit import InputShape

EPS = 1e-6
TOP = 10
"""Classes whose probabilities decide whether a stage is sure."""


class ThinkingVitPath(NestedPath):
    """One network: heads of the stages, and the stage after which it answers."""

    stages: tuple[int, ...] = Field(min_length=1, max_length=3)
    stage: int = Field(ge=0)


class ThinkingVit(BaseModel):
    """The supernet's sizes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["thinkingvit"] = "thinkingvit"
    patch_size: int = Field(16, gt=0)
    embed_dim: int = Field(gt=0)
    depth: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    mlp_ratio: float = Field(4.0, gt=0)
    thinking_stages: tuple[int, ...] = Field(
        min_length=1, max_length=3, description="heads of the stages in training"
    )
    paths: tuple[ThinkingVitPath, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> ThinkingVit:
        """Raise `ValueError` for a path that the supernet does not have."""
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of {self.embed_dim}")
        first = self.thinking_stages
        for path in self.paths:
            if path.stage >= len(path.stages) or len(path.stages) > len(first):
                raise ValueError(f"paths.stage: expected a stage of {first}, got {path.stage}")
            if not 0 < max(path.stages) <= self.num_heads or min(path.stages) < 1:
                raise ValueError(f"paths.stages: expected at most {self.num_heads} heads")
            if path.stages[: path.stage] != first[: path.stage]:
                raise ValueError(
                    f"paths.stages: expected {first[: path.stage]} before the last stage, whose "
                    f"maps exist for these widths only, got {path.stages[: path.stage]}"
                )
        return self

    def sizes(self, inputs: InputShape) -> TensorSizes:
        """Return the sizes of the supernet's tensors."""
        width = self.embed_dim
        sizes = TensorSizes()
        self._embedding.add_sizes(sizes, width, inputs)
        for layer in range(self.depth):
            name = f"blocks.{layer}"
            for norm in ("norm1", "norm2"):
                sizes.add_layer_norm(f"{name}.{norm}", width)
            _attention(layer, width).add_sizes(sizes, width)
            _hidden_layer(layer).add_sizes(sizes, width, int(width * self.mlp_ratio))
        sizes.add_layer_norm("norm", width)
        for number, heads in enumerate(self.thinking_stages[:-1]):
            sizes.add_linear(_map_name(number), width, self._width(heads))
            sizes.add(f"alpha.{number}", 1)
        sizes.add_linear("head", inputs.num_classes, width)
        return sizes

    @property
    def _embedding(self) -> PatchEmbedding:
        return PatchEmbedding("patch_embed.proj", self.patch_size)

    def _width(self, heads: int) -> int:
        return heads * (self.embed_dim // self.num_heads)

    def plan(self, path: ThinkingVitPath, slices: Slices, inputs: InputShape) -> Plan:
        """Return the functions of a path; the stages before the last one are one step."""
        stages = path.stages[: path.stage + 1]
        embed = self._embedding.bind(slices, self.embed_dim)
        last = self._width(stages[-1])
        blocks = tuple(self._block(slices, n, stages[-1]) for n in range(self.depth))
        norm, head = slices.layer_norm("norm", last, EPS), slices.linear("head", None, last)
        think = (self._think(slices, stages[:-1]),) if stages[:-1] else ()
        return Plan(embed, (*think, *blocks), lambda x: head(norm(x)[:, 0]))

    def _think(self, slices: Slices, stages: tuple[int, ...]) -> Step:
        """Return the stages before the last one: embedding -> what the last stage starts from."""
        thoughts: list[tuple[list[Step], Step, Step, Tensor]] = []
        for number, heads in enumerate(stages):
            blocks = [self._block(slices, n, heads) for n in range(self.depth)]
            norm = slices.layer_norm("norm", self._width(heads), EPS)
            convert = slices.linear(_map_name(number), None, None)
            thoughts.append((blocks, norm, convert, slices.take(f"alpha.{number}")))

        def think(embedded: Tensor) -> Tensor:
            start = embedded
            for blocks, norm, convert, gate in thoughts:
                x = start
                for block in blocks:
                    x = block(x)
                start = embedded + gate * convert(norm(x))
            return start

        return think

    def _block(self, slices: Slices, layer: int, heads: int) -> Step:
        """Return one block on the first heads; it cuts what it reads to its width."""
        k, size = self._width(heads), self.embed_dim // self.num_heads
        attend = _attention(layer, self.embed_dim).bind(slices, k, heads, size, EPS)
        transform = _hidden_layer(layer).bind(slices, k, int(k * self.mlp_ratio), EPS)
        return lambda x: transform(attend(x[..., :k]))

    def sample(self, rng: random.Random, level: float) -> dict[str, object]:
        """Return the fields of a random path: a number of heads after the stages before it."""
        heads = max(1, round(level * self.num_heads))
        stage = sum(heads > earlier for earlier in self.thinking_stages[:-1])
        return {"stages": [*self.thinking_stages[:stage], heads], "stage": stage}


def _attention(layer: int, inner: int) -> SelfAttention:
    name = f"blocks.{layer}"
    return SelfAttention(f"{name}.norm1", f"{name}.attn.qkv", f"{name}.attn.proj", inner)


def _hidden_layer(layer: int) -> HiddenLayer:
    name = f"blocks.{layer}"
    return HiddenLayer(f"{name}.norm2", f"{name}.mlp.fc1", f"{name}.mlp.fc2")


def _map_name(number: int) -> str:
    """Return the name of the map after a stage."""
    return "proj_layer" if number == 0 else f"proj_layer{number + 1}"


def exit_entropy(logits: Tensor) -> Tensor:
    """Return the entropy [B] of the renormalised largest probabilities, in nats.

    Upstream stops after the first stage whose entropy is below a threshold.
    """
    top = logits.softmax(1).topk(min(TOP, logits.shape[1]), 1).values
    top = top / top.sum(1, keepdim=True)
    return -(top * top.log()).sum(1)

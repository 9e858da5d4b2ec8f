"""ViT-ResNAS (arXiv 2109.00642; yilunliao/vit-search) as a nested network.

A vision transformer of several stages. Between two stages, a residual spatial reduction halves the
sides of the grid of patches and adds channels. A path chooses the width of every stage, the heads
and the hidden width of every block, and the blocks that are skipped. All are prefixes: of queries,
keys and values each by itself. Layer normalisation is over the active channels, which is what the
masked normalisation of upstream's training computes.

The convolutions before the patches have one width, so that all paths share their statistics of
batch normalisation.
"""

from __future__ import annotations

import random
from typing import Literal

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor

from ladderstitch.vision.models.nested.paths import NestedPath, draw, require_at_most
from ladderstitch.vision.models.nested.sizes import TensorSizes
from ladderstitch.vision.models.nested.slices import Plan, Slices, Step
from ladderstitch.vision.models.nested.spatial_reduction import SpatialReduction
from ladderstitch.vision.models.nested.transformer_layers import (
    HiddenLayer,
    PatchEmbedding,
    SelfAttention,
)
from ladderstitch.vision.models.vit import InputShape

EPS = 1e-6
STEM = "patch_embed.conv"
"""What precedes the number of a convolution before the patches."""


class VitResnasPath(NestedPath):
    """One network: widths of the stages, and sizes of all blocks, also of skipped ones."""

    widths: tuple[PositiveInt, ...] = Field(description="channels, one per stage")
    heads: tuple[PositiveInt, ...] = Field(description="one per block")
    hidden: tuple[PositiveInt, ...] = Field(description="hidden channels, one per block")
    skipped: tuple[int, ...] = Field((), description="positions of blocks that do not run")


class VitResnas(BaseModel):
    """The supernet's sizes, and the choices of random paths."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["vit-resnas"] = "vit-resnas"
    patch_size: int = Field(14, gt=0)
    stem_width: PositiveInt | None = Field(
        24, description="channels of three convolutions before the patches; null: there are none"
    )
    widths: tuple[PositiveInt, ...] = Field(min_length=1, description="channels, one per stage")
    depths: tuple[PositiveInt, ...] = Field(description="blocks, one number per stage")
    heads: tuple[PositiveInt, ...] = Field(description="one per block")
    head_dims: tuple[PositiveInt, ...] = Field(description="size of a head, one per block")
    hidden: tuple[PositiveInt, ...] = Field(description="hidden channels, one per block")
    width_choices: tuple[tuple[PositiveInt, ...], ...] = Field((), description="one list per stage")
    head_choices: tuple[tuple[PositiveInt, ...], ...] = Field((), description="one list per stage")
    hidden_choices: tuple[tuple[PositiveInt, ...], ...] = Field(
        (), description="one list per stage"
    )
    skippable: tuple[int, ...] = Field((), description="blocks that random paths may skip")
    paths: tuple[VitResnasPath, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> VitResnas:
        """Raise `ValueError` for sizes that do not fit, or a path that the net does not have."""
        blocks = sum(self.depths)
        if len(self.depths) != len(self.widths):
            raise ValueError(f"depths: expected {len(self.widths)} values, got {len(self.depths)}")
        for name in ("heads", "head_dims", "hidden"):
            if (got := len(getattr(self, name))) != blocks:
                raise ValueError(f"{name}: expected {blocks} values, got {got}")
        if self.stem_width is not None and self.patch_size % 2:
            raise ValueError(f"patch_size: expected an even number, got {self.patch_size}")
        self._check_widths("widths", self.widths)
        self._check_choices()
        for path in self.paths:
            require_at_most("paths.widths", path.widths, self.widths)
            require_at_most("paths.heads", path.heads, self.heads)
            require_at_most("paths.hidden", path.hidden, self.hidden)
            self._check_widths("paths.widths", path.widths)
            self._check_positions("paths.skipped", path.skipped)
        return self

    def _check_choices(self) -> None:
        for name in ("width_choices", "head_choices", "hidden_choices"):
            lists = getattr(self, name)
            if len(lists) not in (0, len(self.widths)):
                raise ValueError(f"{name}: expected {len(self.widths)} lists, got {len(lists)}")
            if wrong := [part for part in lists if not part or sorted(part) != list(part)]:
                raise ValueError(f"{name}: expected ascending lists, got {list(wrong[0])}")
        self._check_positions("skippable", self.skippable)

    def _check_widths(self, field: str, widths: tuple[int, ...]) -> None:
        # what a reduction adds to its residual connection are channels of zeros
        if sorted(widths) != list(widths):
            raise ValueError(f"{field}: expected no fewer channels than before, got {list(widths)}")

    def _check_positions(self, field: str, positions: tuple[int, ...]) -> None:
        blocks = sum(self.depths)
        if wrong := [position for position in positions if not 0 <= position < blocks]:
            raise ValueError(f"{field}: expected positions from 0 to {blocks - 1}, got {wrong[0]}")

    def _stages(self) -> list[range]:
        """Return the positions of the blocks of every stage."""
        ends = [sum(self.depths[: stage + 1]) for stage in range(len(self.depths))]
        return [range(end - depth, end) for end, depth in zip(ends, self.depths, strict=True)]

    def _side(self, inputs: InputShape) -> int:
        """Return the patches along a side of the first stage; raises `ValueError` as `sizes`."""
        multiple = self.patch_size << (len(self.depths) - 1)
        if inputs.image_size % multiple:
            raise ValueError(
                f"image_size: expected a multiple of {multiple}, got {inputs.image_size}"
            )
        return inputs.image_size // self.patch_size

    def sizes(self, inputs: InputShape) -> TensorSizes:
        """Return the sizes of the supernet's tensors.

        Raises `ValueError` for images whose patches cannot be halved between all stages.
        """
        side, sizes = self._side(inputs), TensorSizes(norms_are_shared=True)
        if self.stem_width is not None:
            for number, ins in enumerate((inputs.in_channels, self.stem_width, self.stem_width)):
                name = f"{STEM}{number + 1}"
                sizes.add_conv(f"{name}.conv", f"{name}.bn", self.stem_width, ins, 3)
        self._embedding.add_sizes(sizes, self.widths[0], self._maps(inputs))
        for stage, (width, blocks) in enumerate(zip(self.widths, self._stages(), strict=True)):
            if stage:
                reduction = self._reduction(stage, blocks, side)
                reduction.add_sizes(sizes, self.widths[stage - 1], width)
                side //= 2
            for block in blocks:
                attention, hidden = self._layers(stage, block)
                for norm in (attention.norm, hidden.norm):
                    sizes.add_layer_norm(norm, width)
                attention.add_sizes(sizes, width)
                hidden.add_sizes(sizes, width, self.hidden[block])
        sizes.add_layer_norm("norm", self.widths[-1])
        sizes.add_linear("cls_head", inputs.num_classes, self.widths[-1])
        return sizes

    @property
    def _embedding(self) -> PatchEmbedding:
        if self.stem_width is None:
            return PatchEmbedding("patch_embed.proj", self.patch_size, "tokens")
        return PatchEmbedding("patch_embed.conv_proj", self.patch_size // 2, "tokens")

    def _maps(self, inputs: InputShape) -> InputShape:
        """Return the shape of what is cut into patches."""
        if self.stem_width is None:
            return inputs
        changed = {"image_size": inputs.image_size // 2, "in_channels": self.stem_width}
        return inputs.model_copy(update=changed)

    def _reduction(self, stage: int, blocks: range, side: int) -> SpatialReduction:
        """Return the reduction before a stage, which counts as a block in names."""
        return SpatialReduction(f"blocks.{blocks.start + stage - 1}", side)

    def _layers(self, stage: int, block: int) -> tuple[SelfAttention, HiddenLayer]:
        """Return the layers of a block; the reductions before it are counted in its name."""
        name, inner = f"blocks.{block + stage}", self.heads[block] * self.head_dims[block]
        attention = SelfAttention(f"{name}.norm1", f"{name}.attn.qkv", f"{name}.attn.proj", inner)
        return attention, HiddenLayer(f"{name}.norm2", f"{name}.mlp.fc1", f"{name}.mlp.fc2")

    def plan(self, path: VitResnasPath, slices: Slices, inputs: InputShape) -> Plan:
        """Return the functions of a path."""
        embed, side = self._embed(slices, path.widths[0], inputs), self._side(inputs)
        steps: list[Step] = []
        for stage, (width, blocks) in enumerate(zip(path.widths, self._stages(), strict=True)):
            if stage:
                reduction = self._reduction(stage, blocks, side)
                steps.append(reduction.bind(slices, path.widths[stage - 1], width, EPS))
                side //= 2
            for block in blocks:
                if block in path.skipped:
                    continue
                attention, hidden = self._layers(stage, block)
                heads, size = path.heads[block], self.head_dims[block]
                steps.append(attention.bind(slices, width, heads, size, EPS))
                steps.append(hidden.bind(slices, width, path.hidden[block], EPS))
        last = path.widths[-1]
        norm, head = slices.layer_norm("norm", last, EPS), slices.linear("cls_head", None, last)
        return Plan(embed, tuple(steps), lambda x: head(norm(x[:, 0])))

    def _embed(self, slices: Slices, width: int, inputs: InputShape) -> Step:
        """Return the function from images to the tokens of the first stage."""
        embed, stem = self._embedding.bind(slices, width), self.stem_width
        if stem is None:
            return embed
        sizes = ((inputs.in_channels, 2), (stem, 1), (stem, 1))
        first, second, third = (
            slices.conv_norm(f"{STEM}{n}.conv", f"{STEM}{n}.bn", stem, ins, stride)
            for n, (ins, stride) in enumerate(sizes, 1)
        )

        def embed_maps(images: Tensor) -> Tensor:
            x = F.relu(first(images))
            return embed(x + F.relu(third(F.relu(second(x)))))

        return embed_maps

    def sample(self, rng: random.Random, level: float) -> dict[str, object]:
        """Return the fields of a random path; `level` from 0 to 1 leans towards large choices.

        The sizes of skipped blocks are the smallest: they change nothing.
        """
        widths: list[int] = []
        heads: list[int] = []
        hidden: list[int] = []
        skipped = [block for block in self.skippable if not draw(rng, (False, True), level)]
        for stage, blocks in enumerate(self._stages()):
            largest, before = self.widths[stage], widths[-1] if widths else 0
            choices = self.width_choices[stage] if self.width_choices else ()
            fitting = [width for width in choices if width >= before] or [largest]
            widths.append(draw(rng, fitting, level))
            for block in blocks:
                lean = 0.0 if block in skipped else level
                ways = self.head_choices[stage] if self.head_choices else (self.heads[block],)
                heads.append(draw(rng, ways, lean))
                ways = self.hidden_choices[stage] if self.hidden_choices else (self.hidden[block],)
                hidden.append(draw(rng, ways, lean))
        return {"widths": widths, "heads": heads, "hidden": hidden, "skipped": skipped}

"""AttentiveNAS and AlphaNet (arXiv 2011.09011, 2102.07954), the networks of BigNAS (2003.11142).

A path chooses the `resolution` of its images, the widths of the first and the last convolution and
of every stage, and of every stage also the depth, one kernel size and one expansion for all its
blocks. Smaller kernels are the centres of the largest. Every block has a shortcut: average pooling
where it halves the maps, then a convolution where its widths differ.
"""

from __future__ import annotations

import random
from typing import Literal

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ladderstitch.vision.models.nested.mobile_layers import add_squeeze, squeeze
from ladderstitch.vision.models.nested.paths import NestedPath, draw, require
from ladderstitch.vision.models.nested.sizes import TensorSizes
from ladderstitch.vision.models.nested.slices import Plan, Slices, Step
from ladderstitch.vision.models.vit import InputShape

Choices = tuple[tuple[int, ...], ...]
"""Ascending values to choose from, for every stage."""
HEAD_EXPANSION, SQUEEZED_LEAST = 6, 1


class AttentiveNasPath(NestedPath):
    """One network: its resolution, its widths, and the choices of its stages."""

    resolution: int | None = Field(None, description="side of images; unset: the family's")
    width: tuple[int, ...] = Field(description="first convolution, stages, last convolution")
    kernel_size: tuple[int, ...] = Field(description="one per stage")
    expand_ratio: tuple[int, ...] = Field(description="one per stage")
    depth: tuple[int, ...] = Field(description="blocks of every stage")

    @property
    def image_size(self) -> int | None:
        """The path's resolution."""
        return self.resolution


class AttentiveNas(BaseModel):
    """The supernet's choices and sizes; the default is the published one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["attentivenas"] = "attentivenas"
    resolution_list: tuple[int, ...] = Field((192, 224, 256, 288), min_length=1)
    width_list: Choices = (
        (16, 24),
        (16, 24),
        (24, 32),
        (32, 40),
        (64, 72),
        (112, 120, 128),
        (192, 200, 208, 216),
        (216, 224),
        (1792, 1984),
    )
    depth_list: Choices = (
        (1, 2),
        (3, 4, 5),
        *((3, 4, 5, 6),) * 2,
        *((3, 4, 5, 6, 7, 8),) * 2,
        (1, 2),
    )
    ks_list: Choices = ((3, 5),) * 7
    expand_ratio_list: Choices = ((1,), *((4, 5, 6),) * 4, (6,), (6,))
    strides: tuple[Literal[1, 2], ...] = (1, 2, 2, 2, 1, 2, 1)
    se: tuple[bool, ...] = Field(
        (False, False, True, False, True, True, True),
        description="whether the blocks of a stage have squeeze and excitation",
    )
    use_v3_head: bool = Field(
        True, description="whether the last convolution follows an expansion and the pooling"
    )
    paths: tuple[AttentiveNasPath, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> AttentiveNas:
        """Raise `ValueError` for a path that the supernet does not have."""
        self._check_lists()
        for number, path in enumerate(self.paths):
            if path.resolution is not None:
                require("resolution", (path.resolution,), 1, self.resolution_list)
            for field, choices in (
                ("width", self.width_list),
                ("kernel_size", self.ks_list),
                ("expand_ratio", self.expand_ratio_list),
                ("depth", self.depth_list),
            ):
                require_each(f"{number}.{field}", getattr(path, field), choices)
        return self

    def _check_lists(self) -> None:
        """Raise `ValueError` for choices of which no network can be made."""
        stages = len(self.strides)
        for name, count in (
            ("width_list", stages + 2),
            ("depth_list", stages),
            ("ks_list", stages),
            ("expand_ratio_list", stages),
            ("se", stages),
        ):
            if (got := len(getattr(self, name))) != count:
                raise ValueError(f"{name}: expected {count} entries, got {got}")
        for name in ("width_list", "depth_list", "ks_list", "expand_ratio_list"):
            for values in getattr(self, name):
                if not values or tuple(sorted(values)) != values or values[0] < 1:
                    raise ValueError(f"{name}: expected ascending lists, got {list(values)}")
        ascending = tuple(sorted(self.resolution_list)) == self.resolution_list
        if not ascending or not 1 <= self.resolution_list[0] <= self.resolution_list[-1] <= 4096:
            raise ValueError(
                f"resolution_list: expected ascending sides from 1 to 4096, "
                f"got {list(self.resolution_list)}"
            )
        if odd := [w for widths in self.width_list for w in widths if w % 8]:
            raise ValueError(f"width_list: expected multiples of 8, got {odd[0]}")
        if even := [size for sizes in self.ks_list for size in sizes if size % 2 == 0]:
            raise ValueError(f"ks_list: expected odd sizes, got {even[0]}")
        for ratios in self.expand_ratio_list:
            if ratios[0] == 1 and ratios != (1,):
                raise ValueError(f"expand_ratio_list: expected 1 alone or none, got {list(ratios)}")

    def sizes(self, inputs: InputShape) -> TensorSizes:
        """Return the sizes of the supernet's tensors."""
        sizes = TensorSizes()
        width = self.width_list[0][-1]
        sizes.add_conv("first_conv.conv.conv", "first_conv.bn.bn", width, inputs.in_channels, 3)
        for stage, depths in enumerate(self.depth_list):
            for block in range(self._first(stage), self._first(stage) + depths[-1]):
                width = self._add_block(sizes, block, stage, width)
        last = self.width_list[-1][-1]
        if self.use_v3_head:
            expand, mix = "last_conv.final_expand_layer", "last_conv.feature_mix_layer"
            middle = HEAD_EXPANSION * width
            sizes.add_conv(f"{expand}.conv.conv", f"{expand}.bn.bn", middle, width, 1)
            sizes.add(f"{mix}.conv.conv.weight", last, middle, 1, 1)
        else:
            sizes.add_conv("last_conv.conv.conv", "last_conv.bn.bn", last, width, 1)
        sizes.add_linear("classifier.linear.linear", inputs.num_classes, last)
        return sizes

    def _first(self, stage: int) -> int:
        """Return the number of the first block of a stage."""
        return sum(depths[-1] for depths in self.depth_list[:stage])

    def _add_block(self, sizes: TensorSizes, block: int, stage: int, width: int) -> int:
        """Add the tensors of a block on `width` channels; return the channels after it."""
        outputs, ratio = self.width_list[stage + 1][-1], self.expand_ratio_list[stage][-1]
        middle, name = width * ratio, f"blocks.{block}.mobile_inverted_conv"
        up, deep, down = (
            f"{name}.{p}" for p in ("inverted_bottleneck", "depth_conv", "point_linear")
        )
        if ratio > 1:
            sizes.add_conv(f"{up}.conv.conv", f"{up}.bn.bn", middle, width, 1)
        sizes.add_conv(f"{deep}.conv.conv", f"{deep}.bn.bn", middle, 1, self.ks_list[stage][-1])
        if self.se[stage]:
            add_squeeze(sizes, f"{deep}.se.fc", middle, SQUEEZED_LEAST)
        sizes.add_conv(f"{down}.conv.conv", f"{down}.bn.bn", outputs, middle, 1)
        sizes.add(f"blocks.{block}.shortcut.conv.conv.weight", outputs, width, 1, 1)
        return outputs

    def plan(self, path: AttentiveNasPath, slices: Slices, inputs: InputShape) -> Plan:
        """Return the functions of a path on images of its own size, the one in `inputs`."""
        width = path.width[0]
        first = slices.conv_norm("first_conv.conv.conv", "first_conv.bn.bn", width, stride=2)
        side = -(-inputs.image_size // 2)
        steps: list[Step] = []
        for stage, depth in enumerate(path.depth):
            outputs = path.width[stage + 1]
            for number in range(depth):
                block = self._first(stage) + number
                stride = self.strides[stage] if number == 0 else 1
                body = self._body(slices, block, stage, path, (width, outputs), stride)
                shortcut = _shortcut(slices, block, (width, outputs), stride, side)
                steps.append(_residual(body, shortcut))
                width, side = outputs, -(-side // stride)
        return Plan(lambda images: F.silu(first(images)), tuple(steps), self._head(slices, path))

    def _body(
        self,
        slices: Slices,
        block: int,
        stage: int,
        path: AttentiveNasPath,
        widths: tuple[int, int],
        stride: int,
    ) -> Step:
        """Return an inverted bottleneck."""
        (ins, outputs), ratio = widths, path.expand_ratio[stage]
        middle, name = ins * ratio, f"blocks.{block}.mobile_inverted_conv"
        up, deep = f"{name}.inverted_bottleneck", f"{name}.depth_conv"
        down = f"{name}.point_linear"
        expand = None
        if ratio > 1:
            expand = slices.conv_norm(f"{up}.conv.conv", f"{up}.bn.bn", middle, ins)
        kernels = slices.take(f"{deep}.conv.conv.weight", middle)
        edge = (self.ks_list[stage][-1] - path.kernel_size[stage]) // 2
        if edge:
            kernels = kernels[:, :, edge:-edge, edge:-edge]
        convolve = slices.depthwise_norm(lambda: kernels, f"{deep}.bn.bn", middle, stride)
        excite = None
        if self.se[stage]:
            excite = squeeze(slices, f"{deep}.se.fc", middle, SQUEEZED_LEAST)
        project = slices.conv_norm(f"{down}.conv.conv", f"{down}.bn.bn", outputs, middle)

        def forward(x: Tensor) -> Tensor:
            y = F.silu(convolve(x if expand is None else F.silu(expand(x))))
            return project(y if excite is None else excite(y))

        return forward

    def _head(self, slices: Slices, path: AttentiveNasPath) -> Step:
        """Return the last convolution, the pooling and the classifier."""
        width, last = path.width[-2:]
        classify = slices.linear("classifier.linear.linear", None, last)
        if not self.use_v3_head:
            convolve = slices.conv_norm("last_conv.conv.conv", "last_conv.bn.bn", last, width)
            return lambda x: classify(F.silu(convolve(x)).mean((2, 3)))
        name, middle = "last_conv.final_expand_layer", HEAD_EXPANSION * width
        expand = slices.conv_norm(f"{name}.conv.conv", f"{name}.bn.bn", middle, width)
        mix = slices.take("last_conv.feature_mix_layer.conv.conv.weight", last, middle).flatten(1)
        return lambda x: classify(F.silu(F.linear(F.silu(expand(x)).mean((2, 3)), mix)))

    def sample(self, rng: random.Random, level: float) -> dict[str, object]:
        """Return the fields of a random path; `level` from 0 to 1 leans towards large choices."""
        return {
            "resolution": draw(rng, self.resolution_list, level),
            "width": [draw(rng, choices, level) for choices in self.width_list],
            "kernel_size": [draw(rng, choices, level) for choices in self.ks_list],
            "expand_ratio": [draw(rng, choices, level) for choices in self.expand_ratio_list],
            "depth": [draw(rng, choices, level) for choices in self.depth_list],
        }


def require_each(field: str, values: tuple[int, ...], choices: Choices) -> None:
    """Raise `ValueError` unless there is one value for every list of choices, and is in it."""
    if len(values) != len(choices):
        raise ValueError(f"paths.{field}: expected {len(choices)} values, got {len(values)}")
    for value, allowed in zip(values, choices, strict=True):
        if value not in allowed:
            raise ValueError(f"paths.{field}: expected one of {list(allowed)}, got {value}")


def _residual(body: Step, shortcut: Step | None) -> Step:
    """Return the sum of a block's body and its shortcut; None is the identity."""
    if shortcut is None:
        return lambda x: x + body(x)
    return lambda x: body(x) + shortcut(x)


def _shortcut(
    slices: Slices, block: int, widths: tuple[int, int], stride: int, side: int
) -> Step | None:
    """Return what is added to a block on maps of this side; None for the maps themselves."""
    ins, outputs = widths
    if ins == outputs and stride == 1:
        return None
    weight = None
    if ins != outputs:
        weight = slices.take(f"blocks.{block}.shortcut.conv.conv.weight", outputs, ins)

    def forward(x: Tensor) -> Tensor:
        if stride > 1:
            # zeros around maps of an odd side count, as upstream's do
            x = F.avg_pool2d(x, stride, padding=side % 2)
        return x if weight is None else F.conv2d(x, weight)

    return forward

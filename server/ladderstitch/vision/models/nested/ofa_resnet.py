"""OFA ResNets (arXiv 1908.09791; mit-han-lab/once-for-all, `OFAResNets`) as a nested network.

A path chooses `d`: whether the stem's residual convolution runs, and for each stage how many blocks
more than the fewest; `e`: the expansion of every block, also of skipped ones; `w`: six positions in
the list of width multipliers (stem's middle, stem, four stages). Skipped are the last blocks of a
stage. The middle width of a block follows from its active output width.
"""

from __future__ import annotations

import random
from typing import Literal

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ladderstitch.vision.models.nested.paths import NestedPath, draw, require
from ladderstitch.vision.models.nested.sizes import TensorSizes, make_divisible
from ladderstitch.vision.models.nested.slices import Plan, Slices, Step
from ladderstitch.vision.models.vit import InputShape

STRIDES = (1, 2, 2, 2)


class OfaResNetPath(NestedPath):
    """One network: depths, expansions of all blocks, positions of the widths."""

    d: tuple[int, ...] = Field(description="stem, then each stage: blocks above the fewest")
    e: tuple[float, ...] = Field(description="middle over output width, one per block")
    w: tuple[int, ...] = Field(description="positions in width_mult_list: stem, stem, stages")


class OfaResNet(BaseModel):
    """The supernet's choices and sizes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["ofa-resnet"] = "ofa-resnet"
    depth_list: tuple[int, ...] = (0, 1, 2)
    expand_ratio_list: tuple[float, ...] = (0.2, 0.25, 0.35)
    width_mult_list: tuple[float, ...] = (0.65, 0.8, 1.0)
    base_depths: tuple[int, int, int, int] = (2, 2, 4, 2)
    stem_width: int = Field(64, gt=0)
    stage_widths: tuple[int, int, int, int] = (256, 512, 1024, 2048)
    stem_pool: bool = Field(True, description="halve the maps after the stem; not for small images")
    paths: tuple[OfaResNetPath, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> OfaResNet:
        """Raise `ValueError` for a path that the supernet does not have."""
        if any(tuple(sorted(values)) != values for values in (self.depth_list, self._widths())):
            raise ValueError("depth_list, width_mult_list: expected ascending lists")
        for path in self.paths:
            require("d", path.d, len(STRIDES) + 1, self.depth_list)
            require("e", path.e, sum(self._blocks()), self.expand_ratio_list)
            require("w", path.w, 6, range(len(self.width_mult_list)))
        return self

    def _widths(self) -> tuple[float, ...]:
        return self.width_mult_list

    def _blocks(self) -> tuple[int, ...]:
        """Return the number of blocks of every stage."""
        return tuple(depth + max(self.depth_list) for depth in self.base_depths)

    def _stem(self, multiplier: float) -> tuple[int, int]:
        """Return the middle and the output width of the stem."""
        width = make_divisible(self.stem_width * multiplier)
        return make_divisible(width // 2), width

    def sizes(self, inputs: InputShape) -> TensorSizes:
        """Return the sizes of the supernet's tensors."""
        sizes = TensorSizes()

        def conv(name: str, outputs: int, ins: int, kernel: int) -> None:
            sizes.add_conv(f"{name}.conv.conv", f"{name}.bn.bn", outputs, ins, kernel)

        middle, width = self._stem(max(self.width_mult_list))
        conv("input_stem.0", middle, inputs.in_channels, 3)
        conv("input_stem.1.conv", middle, middle, 3)
        conv("input_stem.2", width, middle, 3)
        block = 0
        for stage, count in enumerate(self._blocks()):
            outputs = make_divisible(self.stage_widths[stage] * max(self.width_mult_list))
            middle = make_divisible(round(outputs * max(self.expand_ratio_list)))
            for number in range(count):
                conv(f"blocks.{block}.conv1", middle, width, 1)
                conv(f"blocks.{block}.conv2", middle, middle, 3)
                conv(f"blocks.{block}.conv3", outputs, middle, 1)
                if number == 0:
                    conv(f"blocks.{block}.downsample", outputs, width, 1)
                width, block = outputs, block + 1
        sizes.add_linear("classifier.linear.linear", inputs.num_classes, width)
        return sizes

    def plan(self, path: OfaResNetPath, slices: Slices, inputs: InputShape) -> Plan:
        """Return the functions of a path."""
        embed, width = self._embedding(path, slices, inputs)
        steps: list[Step] = []
        first = 0
        for stage, count in enumerate(self._blocks()):
            multiplier = self.width_mult_list[path.w[2 + stage]]
            outputs = make_divisible(self.stage_widths[stage] * multiplier)
            active = count - max(self.depth_list) + path.d[1 + stage]
            for number in range(active):
                middle = make_divisible(round(outputs * path.e[first + number]))
                stride = STRIDES[stage] if number == 0 else 1
                name = f"blocks.{first + number}"
                steps.append(_bottleneck(slices, name, (width, middle, outputs), stride, number))
                width = outputs
            first += count
        head = slices.linear("classifier.linear.linear", None, width)
        return Plan(embed, tuple(steps), lambda x: head(x.mean((2, 3))))

    def _embedding(
        self, path: OfaResNetPath, slices: Slices, inputs: InputShape
    ) -> tuple[Step, int]:
        """Return the stem and its width."""
        middle, _ = self._stem(self.width_mult_list[path.w[0]])
        _, width = self._stem(self.width_mult_list[path.w[1]])
        pools = self.stem_pool

        first = _conv(slices, "input_stem.0", middle, inputs.in_channels, 2)
        runs_middle = path.d[0] == max(self.depth_list)
        second = _conv(slices, "input_stem.1.conv", middle, middle) if runs_middle else None
        third = _conv(slices, "input_stem.2", width, middle)

        def embed(images: Tensor) -> Tensor:
            x = F.relu(first(images))
            if second is not None:
                x = F.relu(second(x)) + x
            x = F.relu(third(x))
            return F.max_pool2d(x, 3, 2, 1) if pools else x

        return embed, width

    def sample(self, rng: random.Random, level: float) -> dict[str, object]:
        """Return the fields of a random path; `level` from 0 to 1 leans towards large choices."""
        widths = range(len(self.width_mult_list))
        return {
            "d": [draw(rng, self.depth_list, level) for _ in range(len(STRIDES) + 1)],
            "e": [draw(rng, self.expand_ratio_list, level) for _ in range(sum(self._blocks()))],
            "w": [draw(rng, widths, level) for _ in range(6)],
        }


def _conv(slices: Slices, name: str, outputs: int, ins: int, stride: int = 1) -> Step:
    """Return a convolution and its normalisation."""
    return slices.conv_norm(f"{name}.conv.conv", f"{name}.bn.bn", outputs, ins, stride)


def _bottleneck(
    slices: Slices, name: str, widths: tuple[int, int, int], stride: int, number: int
) -> Step:
    """Return a bottleneck block; the first of a stage has a pooled 1x1 convolution as shortcut."""
    ins, middle, outputs = widths
    first = _conv(slices, f"{name}.conv1", middle, ins)
    second = _conv(slices, f"{name}.conv2", middle, middle, stride)
    third = _conv(slices, f"{name}.conv3", outputs, middle)
    shortcut = _conv(slices, f"{name}.downsample", outputs, ins) if number == 0 else None

    def forward(x: Tensor) -> Tensor:
        residual = x
        if shortcut is not None:
            pooled = F.avg_pool2d(x, stride, stride, 0, ceil_mode=True) if stride > 1 else x
            residual = shortcut(pooled)
        return F.relu(third(F.relu(second(F.relu(first(x))))) + residual)

    return forward

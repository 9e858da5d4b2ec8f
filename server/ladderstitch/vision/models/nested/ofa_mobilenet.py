"""OFA MobileNetV3 (arXiv 1908.09791; once-for-all, `OFAMobileNetV3`) as a nested network.

A path chooses kernel sizes `ks` and expansions `e` for every block after the first, also for
skipped ones, and depths `d` per stage. Smaller kernels are learned functions of the larger ones:
the centre of the 7x7 kernel times a matrix gives the 5x5 kernel, whose centre times another matrix
gives the 3x3 kernel.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ladderstitch.vision.models.nested.mobile_layers import add_squeeze, squeeze
from ladderstitch.vision.models.nested.paths import NestedPath, draw, require
from ladderstitch.vision.models.nested.sizes import TensorSizes, make_divisible
from ladderstitch.vision.models.nested.slices import Plan, Slices, Step
from ladderstitch.vision.models.vit import InputShape

WIDTHS, FIRST, LAST, MIXED = (24, 40, 80, 112, 160), 16, 960, 1280
STRIDES = (2, 2, 2, 1, 2)
SQUEEZES = (False, True, False, True, True)
HARD_SWISH = (False, False, True, True, True)


class OfaMobileNetPath(NestedPath):
    """One network: kernel sizes and expansions of all blocks, depths of the stages."""

    ks: tuple[int, ...] = Field(description="kernel sizes, one per block after the first")
    e: tuple[int, ...] = Field(description="expansions, one per block after the first")
    d: tuple[int, ...] = Field(description="blocks of every stage")


class OfaMobileNet(BaseModel):
    """The supernet's choices and sizes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["ofa-mbv3"] = "ofa-mbv3"
    width_mult: float = Field(1.0, gt=0)
    ks_list: tuple[int, ...] = (3, 5, 7)
    expand_ratio_list: tuple[int, ...] = (3, 4, 6)
    depth_list: tuple[int, ...] = (2, 3, 4)
    paths: tuple[OfaMobileNetPath, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> OfaMobileNet:
        """Raise `ValueError` for a path that the supernet does not have."""
        for name in ("ks_list", "expand_ratio_list", "depth_list"):
            values = getattr(self, name)
            if tuple(sorted(values)) != values or min(values) < 1:
                raise ValueError(f"{name}: expected an ascending list, got {values}")
        if any(size % 2 == 0 for size in self.ks_list):
            raise ValueError(f"ks_list: expected odd sizes, got {self.ks_list}")
        for path in self.paths:
            require("ks", path.ks, self._most * len(WIDTHS), self.ks_list)
            require("e", path.e, self._most * len(WIDTHS), self.expand_ratio_list)
            require("d", path.d, len(WIDTHS), self.depth_list)
        return self

    @property
    def _most(self) -> int:
        """Blocks of every stage of the largest network."""
        return max(self.depth_list)

    def _width(self, base: int) -> int:
        return make_divisible(base * self.width_mult)

    def sizes(self, inputs: InputShape) -> TensorSizes:
        """Return the sizes of the supernet's tensors."""
        sizes = TensorSizes()
        width = self._width(FIRST)
        sizes.add_conv("first_conv.conv", "first_conv.bn", width, inputs.in_channels, 3)
        for part, ins, kernel in (("depth_conv", 1, 3), ("point_linear", width, 1)):
            name = f"blocks.0.conv.{part}"
            sizes.add_conv(f"{name}.conv", f"{name}.bn", width, ins, kernel)
        for block in range(self._most * len(WIDTHS)):
            width = self._add_block(sizes, block, width)
        last, mixed = self._width(LAST), self._width(MIXED)
        sizes.add_conv("final_expand_layer.conv", "final_expand_layer.bn", last, width, 1)
        sizes.add("feature_mix_layer.conv.weight", mixed, last, 1, 1)
        sizes.add_linear("classifier.linear", inputs.num_classes, mixed)
        return sizes

    def _add_block(self, sizes: TensorSizes, block: int, width: int) -> int:
        """Add the tensors of a block on `width` channels; return the channels after it."""
        stage = block // self._most
        outputs = self._width(WIDTHS[stage])
        middle = make_divisible(round(width * max(self.expand_ratio_list)))
        name = f"blocks.{block + 1}.conv"
        up, deep, down = (
            f"{name}.{p}" for p in ("inverted_bottleneck", "depth_conv", "point_linear")
        )
        sizes.add_conv(f"{up}.conv.conv", f"{up}.bn.bn", middle, width, 1)
        sizes.add_conv(f"{deep}.conv.conv", f"{deep}.bn.bn", middle, 1, max(self.ks_list))
        for target, source in zip(self.ks_list, self.ks_list[1:], strict=False):
            sizes.add(f"{deep}.conv.{source}to{target}_matrix", target**2, target**2)
        if SQUEEZES[stage]:
            add_squeeze(sizes, f"{deep}.se.fc", middle)
        sizes.add_conv(f"{down}.conv.conv", f"{down}.bn.bn", outputs, middle, 1)
        return outputs

    def plan(self, path: OfaMobileNetPath, slices: Slices, inputs: InputShape) -> Plan:
        """Return the functions of a path."""
        first = slices.conv_norm("first_conv.conv", "first_conv.bn", stride=2)
        width = self._width(FIRST)
        steps: list[Step] = [_first_block(slices, width)]
        for stage, depth in enumerate(path.d):
            outputs = self._width(WIDTHS[stage])
            for number in range(depth):
                block = stage * self._most + number
                middle = make_divisible(round(width * path.e[block]))
                steps.append(
                    self._block(
                        slices,
                        f"blocks.{block + 1}.conv",
                        (width, middle, outputs),
                        path.ks[block],
                        STRIDES[stage] if number == 0 else 1,
                        stage,
                    )
                )
                width = outputs
        expand = slices.conv_norm("final_expand_layer.conv", "final_expand_layer.bn")
        mix = slices.take("feature_mix_layer.conv.weight").flatten(1)
        head = slices.linear("classifier.linear", None, None)

        def classify(x: Tensor) -> Tensor:
            pooled = F.hardswish(expand(x)).mean((2, 3))
            return head(F.hardswish(F.linear(pooled, mix)))

        return Plan(lambda images: F.hardswish(first(images)), tuple(steps), classify)

    def _block(
        self,
        slices: Slices,
        name: str,
        widths: tuple[int, int, int],
        kernel: int,
        stride: int,
        stage: int,
    ) -> Step:
        """Return an inverted residual block of a stage."""
        ins, middle, outputs = widths
        activate = F.hardswish if HARD_SWISH[stage] else F.relu
        up, deep = f"{name}.inverted_bottleneck", f"{name}.depth_conv"
        down = f"{name}.point_linear"
        expand = slices.conv_norm(f"{up}.conv.conv", f"{up}.bn.bn", middle, ins)
        kernels = self._kernels(slices, f"{deep}.conv", middle, kernel)
        convolve = slices.depthwise_norm(kernels, f"{deep}.bn.bn", middle, stride)
        excite = squeeze(slices, f"{deep}.se.fc", middle) if SQUEEZES[stage] else None
        project = slices.conv_norm(f"{down}.conv.conv", f"{down}.bn.bn", outputs, middle)
        residual = stride == 1 and ins == outputs

        def forward(x: Tensor) -> Tensor:
            y = activate(convolve(activate(expand(x))))
            y = project(y if excite is None else excite(y))
            return x + y if residual else y

        return forward

    def _kernels(self, slices: Slices, name: str, channels: int, size: int) -> Callable[[], Tensor]:
        """Return the function that gives the kernels [channels, 1, size, size].

        They are computed at each call, which takes little time: stored for every path, they would
        be a quarter of the weights.
        """
        largest = slices.take(f"{name}.conv.weight", channels)
        steps: list[tuple[int, int, Tensor]] = []
        for target, source in zip(self.ks_list[-2::-1], self.ks_list[:0:-1], strict=True):
            if source > size:
                matrix = slices.take(f"{name}.{source}to{target}_matrix")
                steps.append((source, target, matrix))

        def transform() -> Tensor:
            kernels = largest
            for source, target, matrix in steps:
                edge = (source - target) // 2
                centre = kernels[:, :, edge : edge + target, edge : edge + target]
                kernels = F.linear(centre.flatten(1), matrix).view(channels, 1, target, target)
            return kernels

        return transform

    def sample(self, rng: random.Random, level: float) -> dict[str, object]:
        """Return the fields of a random path; `level` from 0 to 1 leans towards large choices."""
        blocks = range(self._most * len(WIDTHS))
        return {
            "ks": [draw(rng, self.ks_list, level) for _ in blocks],
            "e": [draw(rng, self.expand_ratio_list, level) for _ in blocks],
            "d": [draw(rng, self.depth_list, level) for _ in WIDTHS],
        }


def _first_block(slices: Slices, width: int) -> Step:
    """Return the fixed first block, without expansion, with a shortcut."""
    name = "blocks.0.conv"
    weight = slices.take(f"{name}.depth_conv.conv.weight")
    convolve = slices.depthwise_norm(lambda: weight, f"{name}.depth_conv.bn", width)
    project = slices.conv_norm(f"{name}.point_linear.conv", f"{name}.point_linear.bn")
    return lambda x: x + project(F.relu(convolve(x)))

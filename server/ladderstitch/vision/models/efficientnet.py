"""EfficientNet-Lite as an anchor: EfficientNet (arXiv 1905.11946) with ReLU6, without squeezing.

Module names are those of the published state dicts. Convolutions pad like TensorFlow's "same": an
odd pixel of padding goes to the right and to the bottom.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ladderstitch.vision.models.parallel import BranchBlock
from ladderstitch.vision.models.stitched import Backbone, ConvConfig, fold
from ladderstitch.vision.models.vit import InputShape

KERNELS = (3, 3, 5, 3, 5, 5, 3)
STRIDES = (1, 2, 2, 2, 1, 2, 1)
EXPANSIONS = (1, 6, 6, 6, 6, 6, 6)
EPS = 1e-3

Seven = tuple[int, int, int, int, int, int, int]


class EfficientNetLiteConfig(ConvConfig):
    """Shape of one EfficientNet-Lite anchor with its seven stages."""

    kind: Literal["efficientnet-lite"] = "efficientnet-lite"
    widths: Seven = Field(description="output channels of each stage")
    depths: Seven = Field(description="blocks of each stage")
    stem: int = Field(32, gt=0, description="channels of the first convolution")
    head: int = Field(1280, gt=0, description="channels before the classifier")

    def first_residual(self, stage: int) -> int:
        """Return the first block of a stage whose output has its input's shape."""
        before = (self.stem, *self.widths)[stage]
        return 0 if STRIDES[stage] == 1 and before == self.widths[stage] else 1

    def build(self, inputs: InputShape) -> EfficientNetLite:
        """Return the anchor with its initial weights."""
        return EfficientNetLite(inputs, self)


class SameConv(nn.Conv2d):
    """A convolution whose output side is the input side divided by the stride, rounded up."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps [B, D_out, h', w'] of maps [B, D_in, h, w]."""
        size, step = self.kernel_size[0], self.stride[0]
        spare = [max((-(-n // step) - 1) * step + size - n, 0) for n in x.shape[-2:]]
        if any(s % 2 for s in spare):
            (up, down), (left, right) = ((s // 2, s - s // 2) for s in spare)
            x = F.pad(x, (left, right, up, down))
            return F.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)
        padding = (spare[0] // 2, spare[1] // 2)
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, 1, self.groups)


def _conv(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> SameConv:
    return SameConv(before, after, kernel, stride=stride, groups=groups, bias=False)


class InvertedResidual(BranchBlock):
    """1x1 expansion, depthwise convolution, 1x1 projection; plus x if the shape is unchanged."""

    def __init__(self, before: int, after: int, stage: int, stride: int) -> None:
        super().__init__()
        middle = before * EXPANSIONS[stage]
        self.expands = EXPANSIONS[stage] > 1
        last = ("_depthwise_conv", "_project_conv")
        self.chain = ("_expand_conv", *last) if self.expands else last
        self.adds = stride == 1 and before == after
        if self.expands:
            self._expand_conv = _conv(before, middle, 1)
            self._bn0: nn.Module = nn.BatchNorm2d(middle, eps=EPS)
        self._depthwise_conv = _conv(middle, middle, KERNELS[stage], stride, groups=middle)
        self._bn1: nn.Module = nn.BatchNorm2d(middle, eps=EPS)
        self._project_conv = _conv(middle, after, 1)
        self._bn2: nn.Module = nn.BatchNorm2d(after, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output maps for maps [B, D, h, w]."""
        y = self.branch(x)
        return x + y if self.adds else y

    def branch(self, x: Tensor) -> Tensor:
        """Return what the three convolutions make of maps [B, D, h, w]."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        return self._bn2(self._project_conv(y))

    def fold_batch_norm(self) -> None:
        """Fold the norms into the convolutions; in place."""
        if self.expands:
            self._expand_conv, self._bn0 = fold(self._expand_conv, self._bn0)
        self._depthwise_conv, self._bn1 = fold(self._depthwise_conv, self._bn1)
        self._project_conv, self._bn2 = fold(self._project_conv, self._bn2)


class EfficientNetLite(Backbone):
    """An EfficientNet-Lite anchor; its steps work on maps [B, D, h, w]."""

    def __init__(self, inputs: InputShape, config: EfficientNetLiteConfig) -> None:
        super().__init__()
        self._conv_stem = _conv(inputs.in_channels, config.stem, 3, 2)
        self._bn0: nn.Module = nn.BatchNorm2d(config.stem, eps=EPS)
        blocks, before = [], config.stem
        for stage, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            for index in range(depth):
                stride = 1 if index else STRIDES[stage]
                blocks.append(InvertedResidual(before, width, stage, stride))
                before = width
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = _conv(before, config.head, 1)
        self._bn1: nn.Module = nn.BatchNorm2d(config.head, eps=EPS)
        self._fc = nn.Linear(config.head, inputs.num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """Return maps [B, D, H/2, W/2] of images [B, C, H, W]."""
        return F.relu6(self._bn0(self._conv_stem(images)))

    def steps(self) -> Sequence[nn.Module]:
        """Return the blocks of all stages in order."""
        return list(self._blocks)

    def classify(self, x: Tensor, *, final_norm: bool) -> Tensor:
        """Return the logits [B, num_classes] of maps [B, D, h, w].

        The norm belongs to the head's convolution, so `final_norm` has no effect.
        """
        return self._fc(F.relu6(self._bn1(self._conv_head(x))).mean((2, 3)))

    def fold_batch_norm(self) -> None:
        """Fold the norms into the convolutions; in place."""
        self._conv_stem, self._bn0 = fold(self._conv_stem, self._bn0)
        self._conv_head, self._bn1 = fold(self._conv_head, self._bn1)

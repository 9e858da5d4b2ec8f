"""The residual network (arXiv 1512.03385) as an anchor; module names are torchvision's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ladderstitch.vision.models.parallel import BranchBlock
from ladderstitch.vision.models.stitched import Backbone, ConvConfig, fold
from ladderstitch.vision.models.vit import InputShape


class ResNetConfig(ConvConfig):
    """Shape of one ResNet anchor; widths double from stage to stage."""

    kind: Literal["resnet"] = "resnet"
    block: Literal["BasicBlock", "Bottleneck"]
    depths: tuple[int, int, int, int]
    width: int = Field(64, gt=0, description="channels within the first stage's blocks")
    batch_norm_eps: float = Field(1e-5, gt=0)
    stem: Literal["large", "small"] = Field(
        "large",
        description="large: 7x7 convolution and pooling, a quarter of the image's side; small: 3x3 "
        "convolution at full size, for images of about 32 pixels (section 4.2)",
    )

    @property
    def expansion(self) -> int:
        """Ratio of the channels that leave a block to the channels within it."""
        return 1 if self.block == "BasicBlock" else 4

    def first_residual(self, stage: int) -> int:
        """Return the first block of a stage whose output has its input's shape."""
        return 0 if stage == 0 and self.expansion == 1 else 1

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels that leave each stage."""
        return tuple(self.width * self.expansion * 2**stage for stage in range(4))

    def build(self, inputs: InputShape) -> ResNet:
        """Return the anchor with its initial weights."""
        return ResNet(inputs, self)


class ResNetBlock(BranchBlock):
    """A branch plus a shortcut, with a ReLU after the sum."""

    downsample: nn.Sequential | None

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output maps for maps [B, D, h, w]."""
        y = self.branch(x)
        return self.activate(y + (x if self.downsample is None else self.downsample(x)))

    def activate(self, x: Tensor) -> Tensor:
        """Return the ReLU of the sum."""
        return F.relu(x)


class BasicBlock(ResNetBlock):
    """Two 3x3 convolutions, the first with the stride, plus a shortcut."""

    chain = ("conv1", "conv2")

    def __init__(self, before: int, width: int, stride: int, eps: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        self.bn1: nn.Module = nn.BatchNorm2d(width, eps=eps)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2: nn.Module = nn.BatchNorm2d(width, eps=eps)
        self.downsample = _shortcut(before, width, stride, eps)

    def branch(self, x: Tensor) -> Tensor:
        """Return what the block adds to its shortcut, for maps [B, D, h, w]."""
        y = F.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(y))

    def fold_batch_norm(self) -> None:
        """Fold the norms into the convolutions; in place."""
        self.conv1, self.bn1 = fold(self.conv1, self.bn1)
        self.conv2, self.bn2 = fold(self.conv2, self.bn2)
        _fold_shortcut(self.downsample)


class Bottleneck(ResNetBlock):
    """1x1, 3x3 (with the stride) and 1x1 convolutions plus a shortcut; the output has 4 x width."""

    chain = ("conv1", "conv2", "conv3")

    def __init__(self, before: int, width: int, stride: int, eps: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn1: nn.Module = nn.BatchNorm2d(width, eps=eps)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2: nn.Module = nn.BatchNorm2d(width, eps=eps)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3: nn.Module = nn.BatchNorm2d(4 * width, eps=eps)
        self.downsample = _shortcut(before, 4 * width, stride, eps)

    def branch(self, x: Tensor) -> Tensor:
        """Return what the block adds to its shortcut, for maps [B, D, h, w]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return self.bn3(self.conv3(y))

    def fold_batch_norm(self) -> None:
        """Fold the norms into the convolutions; in place."""
        self.conv1, self.bn1 = fold(self.conv1, self.bn1)
        self.conv2, self.bn2 = fold(self.conv2, self.bn2)
        self.conv3, self.bn3 = fold(self.conv3, self.bn3)
        _fold_shortcut(self.downsample)


def _shortcut(before: int, after: int, stride: int, eps: float) -> nn.Sequential | None:
    """Return a 1x1 convolution with its norm, or None where the shape does not change."""
    if stride == 1 and before == after:
        return None
    return nn.Sequential(
        nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after, eps=eps)
    )


def _fold_shortcut(shortcut: nn.Sequential | None) -> None:
    if shortcut is not None and isinstance(shortcut[0], nn.Conv2d):
        shortcut[0], shortcut[1] = fold(shortcut[0], shortcut[1])


class ResNet(Backbone):
    """A ResNet anchor; its steps work on maps [B, D, h, w]."""

    def __init__(self, inputs: InputShape, config: ResNetConfig) -> None:
        super().__init__()
        eps, block = config.batch_norm_eps, BasicBlock
        kind = block if config.block == "BasicBlock" else Bottleneck
        self.pools = config.stem == "large"
        size, stride = (7, 2) if self.pools else (3, 1)
        self.conv1 = nn.Conv2d(
            inputs.in_channels, config.width, size, stride=stride, padding=size // 2, bias=False
        )
        self.bn1: nn.Module = nn.BatchNorm2d(config.width, eps=eps)
        before = config.width
        for stage, depth in enumerate(config.depths):
            blocks = []
            for index in range(depth):
                stride = 2 if stage and not index else 1
                blocks.append(kind(before, config.width * 2**stage, stride, eps))
                before = config.widths[stage]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(before, inputs.num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """Return maps [B, D, H/4, W/4] of images [B, C, H, W], or [B, D, H, W] of small ones."""
        x = F.relu(self.bn1(self.conv1(images)))
        return F.max_pool2d(x, 3, stride=2, padding=1) if self.pools else x

    def steps(self) -> Sequence[nn.Module]:
        """Return the blocks of all stages in order."""
        stages = (self.get_submodule(f"layer{stage}") for stage in range(1, 5))
        return [block for stage in stages for block in stage.children()]

    def classify(self, x: Tensor, *, final_norm: bool) -> Tensor:
        """Return the logits [B, num_classes] of the mean of maps [B, D, h, w]; no final norm."""
        return self.fc(x.mean((2, 3)))

    def fold_batch_norm(self) -> None:
        """Fold the norms into the convolutions; in place."""
        self.conv1, self.bn1 = fold(self.conv1, self.bn1)

"""The residual spatial reduction of ViT-ResNAS: half as many patches along a side, wider tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch.vision.models.nested.sizes import TensorSizes
from ladderstitch.vision.models.nested.slices import Slices, Step

KERNEL = 3


@dataclass(frozen=True, slots=True)
class SpatialReduction:
    """A norm, then a strided convolution of the patches and a linear map of the class token.

    The residual connection averages four patches, keeps the class token and adds channels of
    zeros. `side` is the even number of patches along a side before the reduction.
    """

    name: str
    side: int

    def add_sizes(self, sizes: TensorSizes, ins: int, outputs: int) -> None:
        """Add the tensors of a reduction from `ins` to `outputs` channels."""
        sizes.add_layer_norm(f"{self.name}.norm", ins)
        sizes.add(f"{self.name}.patch_reduce.weight", outputs, ins, KERNEL, KERNEL)
        sizes.add(f"{self.name}.patch_reduce.bias", outputs)
        sizes.add(f"{self.name}.pos_embed", 1, (self.side // 2) ** 2, outputs)
        sizes.add_linear(f"{self.name}.token_transform", outputs, ins)

    def bind(self, slices: Slices, ins: int, outputs: int, eps: float) -> Step:
        """Return the function from tokens [B, 1 + side^2, ins] to [B, 1 + side^2 / 4, outputs]."""
        norm = slices.layer_norm(f"{self.name}.norm", ins, eps)
        kernel = slices.take(f"{self.name}.patch_reduce.weight", outputs, ins)
        bias = slices.take(f"{self.name}.patch_reduce.bias", outputs)
        positions = slices.take(f"{self.name}.pos_embed", None, None, outputs)
        convert = slices.linear(f"{self.name}.token_transform", outputs, ins)

        def reduce(x: Tensor) -> Tensor:
            y = norm(x)
            averages = _tokens(F.avg_pool2d(self._maps(x), 2))
            patches = _tokens(F.conv2d(self._maps(y), kernel, bias, 2, KERNEL // 2))
            added = torch.cat((convert(y[:, :1]), patches + positions), 1)
            return added + F.pad(torch.cat((x[:, :1], averages), 1), (0, outputs - ins))

        return reduce

    def _maps(self, x: Tensor) -> Tensor:
        """Return the patches as maps [B, C, side, side]."""
        return x[:, 1:].transpose(1, 2).unflatten(2, (self.side, self.side))


def _tokens(maps: Tensor) -> Tensor:
    """Return maps [B, C, h, w] as tokens [B, h * w, C]."""
    return maps.flatten(2).transpose(1, 2)

"""Layers that the nested transformers have in common: embedded patches and hidden layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch.vision.models.nested.sizes import TensorSizes
from ladderstitch.vision.models.nested.slices import Slices, Step
from ladderstitch.vision.models.vit import InputShape


@dataclass(frozen=True, slots=True)
class PatchEmbedding:
    """Square patches of `patch_size` pixels as tokens, after a class token, with positions.

    `name` is that of the projection of patches.
    """

    name: str
    patch_size: int

    def add_sizes(self, sizes: TensorSizes, width: int, inputs: InputShape) -> None:
        """Add the tensors of an embedding of `width` channels."""
        patch = self.patch_size
        sizes.add("cls_token", 1, 1, width)
        sizes.add("pos_embed", 1, (inputs.image_size // patch) ** 2 + 1, width)
        sizes.add(f"{self.name}.weight", width, inputs.in_channels, patch, patch)
        sizes.add(f"{self.name}.bias", width)

    def bind(self, slices: Slices, width: int) -> Step:
        """Return the function from images [B, C, H, W] to tokens [B, T, width]."""
        stride = self.patch_size
        kernel = slices.take(f"{self.name}.weight", width)
        bias = slices.take(f"{self.name}.bias", width)
        first = slices.take("cls_token", None, None, width)
        positions = slices.take("pos_embed", None, None, width)

        def embed(images: Tensor) -> Tensor:
            patches = F.conv2d(images, kernel, bias, stride).flatten(2).transpose(1, 2)
            return torch.cat((first.expand(images.shape[0], -1, -1), patches), 1) + positions

        return embed


@dataclass(frozen=True, slots=True)
class HiddenLayer:
    """The second half of a block: a hidden layer after a norm, with a residual connection."""

    norm: str
    up: str
    down: str

    def add_sizes(self, sizes: TensorSizes, width: int, hidden: int) -> None:
        """Add the tensors of the two linear layers."""
        sizes.add_linear(self.up, hidden, width)
        sizes.add_linear(self.down, width, hidden)

    def bind(self, slices: Slices, width: int, hidden: int, eps: float) -> Step:
        """Return the function of tokens [B, T, width]; `eps` is that of the norm."""
        norm = slices.layer_norm(self.norm, width, eps)
        up = slices.linear(self.up, hidden, width)
        down = slices.linear(self.down, width, hidden)
        return lambda x: x + down(F.gelu(up(norm(x))))

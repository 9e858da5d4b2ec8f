"""Layers that the nested transformers have in common: patches, attention and hidden layers."""

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

    `name` is that of the projection of patches, `token` that of the class token.
    """

    name: str
    patch_size: int
    token: str = "cls_token"

    def add_sizes(self, sizes: TensorSizes, width: int, inputs: InputShape) -> None:
        """Add the tensors of an embedding of `width` channels."""
        patch = self.patch_size
        sizes.add(self.token, 1, 1, width)
        sizes.add("pos_embed", 1, (inputs.image_size // patch) ** 2 + 1, width)
        sizes.add(f"{self.name}.weight", width, inputs.in_channels, patch, patch)
        sizes.add(f"{self.name}.bias", width)

    def bind(self, slices: Slices, width: int) -> Step:
        """Return the function from images [B, C, H, W] to tokens [B, T, width]."""
        stride = self.patch_size
        kernel = slices.take(f"{self.name}.weight", width)
        bias = slices.take(f"{self.name}.bias", width)
        first = slices.take(self.token, None, None, width)
        positions = slices.take("pos_embed", None, None, width)

        def embed(images: Tensor) -> Tensor:
            patches = F.conv2d(images, kernel, bias, stride).flatten(2).transpose(1, 2)
            return torch.cat((first.expand(images.shape[0], -1, -1), patches), 1) + positions

        return embed


@dataclass(frozen=True, slots=True)
class SelfAttention:
    """The first half of a block: attention after a norm, with a residual connection.

    `qkv` has three parts of `inner` rows, the width of all heads of the supernet, and a path reads
    the first rows of each part.
    """

    norm: str
    qkv: str
    project: str
    inner: int

    def add_sizes(self, sizes: TensorSizes, width: int) -> None:
        """Add the tensors of the two linear layers."""
        sizes.add_linear(self.qkv, 3 * self.inner, width)
        sizes.add_linear(self.project, width, self.inner)

    def bind(self, slices: Slices, width: int, heads: int, size: int, eps: float) -> Step:
        """Return the function of tokens [B, T, width] with heads of `size`; `eps` of the norm."""
        norm = slices.layer_norm(self.norm, width, eps)
        active = heads * size
        parts = [slices.rows(self.qkv, i * self.inner, active, width) for i in range(3)]
        project = slices.linear(self.project, width, active)

        def attend(x: Tensor) -> Tensor:
            y = norm(x)
            split = [
                F.linear(y, w, b).unflatten(2, (heads, size)).transpose(1, 2) for w, b in parts
            ]
            mixed = F.scaled_dot_product_attention(*split)
            return x + project(mixed.transpose(1, 2).flatten(2))

        return attend


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

"""An anchor as its family's routes see it: an embedding, steps in a row, a classifier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn


class Trunk(nn.Module, ABC):
    """What every anchor is, whatever its blocks are.

    A hierarchical network's downsamplings are steps too, so that a position in `steps` is all that
    a route needs to say where it enters or leaves.
    """

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """[B, C, H, W] images -> what enters step 0."""

    @abstractmethod
    def steps(self) -> Sequence[nn.Module]:
        """Blocks, and whatever stands between two stages, in order."""

    @abstractmethod
    def classify(self, x: Tensor, *, final_norm: bool) -> Tensor:
        """What leaves the last step -> [B, num_classes] logits."""

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] images -> [B, num_classes] logits."""
        x = self.embed(images)
        for step in self.steps():
            x = step(x)
        return self.classify(x, final_norm=True)


def rows(x: Tensor) -> Tensor:
    """Tokens [B, T, D] or a map [B, D, H, W] as rows [B * T, D] or [B * H * W, D]."""
    if x.dim() == 4:
        return x.permute(0, 2, 3, 1).flatten(0, 2)
    return x.flatten(0, 1)

"""Batch normalisation folded into the layer before it, for serving."""

from __future__ import annotations

from typing import Protocol, TypeVar, cast, runtime_checkable

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

Layer = TypeVar("Layer", bound=nn.Module)


@runtime_checkable
class FoldsBatchNorm(Protocol):
    """A module that normalises batches, and need not once it is trained."""

    def fold_batch_norm(self) -> None:
        """Fold the running statistics into the layers before; in place."""


def fold(layer: Layer, norm: nn.Module) -> tuple[Layer, nn.Module]:
    """One layer that does what both do in eval mode, and nothing after it."""
    if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
        return cast(Layer, fuse_conv_bn_eval(layer, norm)), nn.Identity()
    if isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
        return cast(Layer, fuse_linear_bn_eval(layer, norm)), nn.Identity()
    return layer, norm

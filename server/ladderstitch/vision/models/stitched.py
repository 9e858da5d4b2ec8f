"""The stitchable model: every network of a family in one set of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor, nn

from ladderstitch.vision.models.backbone import Trunk
from ladderstitch.vision.models.batch_norm import FoldsBatchNorm
from ladderstitch.vision.models.route import Stitch


class StitchingLayer(nn.Module):
    """Affine map from one anchor's tokens to another's, [B, T, D_front] -> [B, T, D_end]."""

    def __init__(self, front_dim: int, end_dim: int) -> None:
        super().__init__()
        self.transform = nn.Linear(front_dim, end_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.transform(x)


class MapStitchingLayer(nn.Module):
    """The same on feature maps, [B, D_front, H, W] -> [B, D_end, H, W]: a 1x1 convolution.

    With `to_tokens` the result is [B, H * W, D_end], for an end anchor that works on tokens.
    """

    def __init__(self, front_dim: int, end_dim: int, *, to_tokens: bool = False) -> None:
        super().__init__()
        self.transform = nn.Conv2d(front_dim, end_dim, 1)
        self.to_tokens = to_tokens

    def forward(self, x: Tensor) -> Tensor:
        mapped: Tensor = self.transform(x)
        return mapped.flatten(2).transpose(1, 2) if self.to_tokens else mapped


Layers: TypeAlias = "nn.Module | Sequence[Layers]"
"""Stitching layers, nested as their published keys are."""


class StitchedModel(nn.Module):
    """Anchors and stitching layers, loaded once; `forward` takes the route to run.

    Calls with different stitches share every weight and no state, so any two may be in flight at
    once. State-dict keys are the published ones: `anchors.{a}.<upstream's key>` and
    `stitch_layers.{...}.transform.{weight,bias}`.
    """

    def __init__(
        self, anchors: Sequence[Trunk], stitch_layers: Sequence[Layers], stitches: Sequence[Stitch]
    ) -> None:
        super().__init__()
        self.anchors = nn.ModuleList(anchors)
        self.stitch_layers = nn.ModuleList(_nest(layers) for layers in stitch_layers)
        self.stitches = tuple(stitches)
        modules = dict(self.named_modules())
        self._steps = {s.id: _resolve(s, self.trunks(), modules) for s in self.stitches}

    def trunks(self) -> list[Trunk]:
        """The anchors, smallest first."""
        return [anchor for anchor in self.anchors if isinstance(anchor, Trunk)]

    def affine(self, layer: str) -> nn.Linear | nn.Conv2d:
        """The affine map of a stitching layer, by its state-dict key."""
        module = self.get_submodule(layer)
        assert isinstance(module, nn.Linear | nn.Conv2d)
        return module

    def fold_batch_norm(self) -> None:
        """Fold batch normalisation into the layers before it, for serving; in place."""
        for part in (*self.anchors.modules(), *self.stitch_layers.modules()):
            if isinstance(part, FoldsBatchNorm):
                part.fold_batch_norm()

    def forward(self, images: Tensor, stitch: int) -> Tensor:
        """[B, C, H, W] images -> [B, num_classes] logits of the network `stitch` (an id).

        Raises `KeyError` for an id that the family does not have.
        """
        front, steps, end, final_norm = self._steps[stitch]
        x = front.embed(images)
        for step in steps:
            x = step(x)
        return end.classify(x, final_norm=final_norm)


def _nest(layers: Layers) -> nn.Module:
    if isinstance(layers, nn.Module):
        return layers
    return nn.ModuleList(_nest(inner) for inner in layers)


def _resolve(
    stitch: Stitch, trunks: Sequence[Trunk], modules: dict[str, nn.Module]
) -> tuple[Trunk, tuple[nn.Module, ...], Trunk, bool]:
    """The modules that a stitch runs, looked up once so that switching costs one dict access."""
    steps: list[nn.Module] = []
    for segment, layer in zip(stitch.segments, (*stitch.layers, None), strict=True):
        steps.extend(list(trunks[segment.anchor].steps())[segment.first : segment.last + 1])
        if layer is not None:
            steps.append(modules[layer.removesuffix(".transform")])
    return trunks[stitch.front], tuple(steps), trunks[stitch.end], stitch.final_norm

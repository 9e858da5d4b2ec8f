"""The stitchable model: every network of a family in one set of weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias, TypeVar, cast, runtime_checkable

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

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
        self,
        anchors: Sequence[Backbone],
        stitch_layers: Sequence[Layers],
        stitches: Sequence[Stitch],
    ) -> None:
        super().__init__()
        self.anchors = nn.ModuleList(anchors)
        self.stitch_layers = nn.ModuleList(_nest(layers) for layers in stitch_layers)
        self.stitches = tuple(stitches)
        modules = dict(self.named_modules())
        self._steps = {s.id: _resolve(s, self.trunks(), modules) for s in self.stitches}

    def trunks(self) -> list[Backbone]:
        """The anchors, smallest first."""
        return [anchor for anchor in self.anchors if isinstance(anchor, Backbone)]

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
    stitch: Stitch, trunks: Sequence[Backbone], modules: dict[str, nn.Module]
) -> tuple[Backbone, tuple[nn.Module, ...], Backbone, bool]:
    """The modules that a stitch runs, looked up once so that switching costs one dict access."""
    steps: list[nn.Module] = []
    for segment, layer in zip(stitch.segments, (*stitch.layers, None), strict=True):
        steps.extend(list(trunks[segment.anchor].steps())[segment.first : segment.last + 1])
        if layer is not None:
            steps.append(modules[layer.removesuffix(".transform")])
    return trunks[stitch.front], tuple(steps), trunks[stitch.end], stitch.final_norm


class Backbone(nn.Module, ABC):
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


class ConvConfig(BaseModel):
    """Shape of an anchor whose steps are its blocks, on maps [B, D, H, W]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    depths: tuple[int, ...]

    @property
    def layout(self) -> Literal["map"]:
        return "map"

    @property
    def total_steps(self) -> int:
        return sum(self.depths)

    def span(self, stage: int, block: int) -> tuple[int, int]:
        """First and last step of a stage's block."""
        step = sum(self.depths[:stage]) + block
        return step, step

"""The stitchable model (all networks of a family in one set of weights) and its building blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias, TypeVar, cast, runtime_checkable

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ladderstitch.vision.models.parallel import find_part
from ladderstitch.vision.models.route import Stitch


class StitchingLayer(nn.Module):
    """An affine map from one anchor's tokens to another's, [B, T, D_front] -> [B, T, D_end]."""

    def __init__(self, front_dim: int, end_dim: int) -> None:
        super().__init__()
        self.transform = nn.Linear(front_dim, end_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens [B, T, D_end] of tokens [B, T, D_front]."""
        return self.transform(x)


class MapStitchingLayer(nn.Module):
    """A 1x1 convolution from one anchor's feature maps to another's.

    The input is [B, D_front, h, w]. The output is [B, D_end, h, w] or, for an end anchor that works
    on tokens (`to_tokens`), [B, h * w, D_end].
    """

    def __init__(self, front_dim: int, end_dim: int, *, to_tokens: bool = False) -> None:
        super().__init__()
        self.transform = nn.Conv2d(front_dim, end_dim, 1)
        self.to_tokens = to_tokens

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps or tokens of maps [B, D_front, h, w]."""
        mapped: Tensor = self.transform(x)
        return mapped.flatten(2).transpose(1, 2) if self.to_tokens else mapped


Layers: TypeAlias = "nn.Module | Sequence[Layers]"
"""Stitching layers, nested like their published keys."""


class StitchedModel(nn.Module):
    """The anchors and stitching layers of a family; `forward` takes the stitch as an argument.

    Calls with different stitches share every weight and no state, so they may run concurrently.
    State-dict keys are the published ones: `anchors.{a}.<upstream's key>` and
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
        self._steps = {s.id: _resolve_route(s, self.backbones(), modules) for s in self.stitches}

    def backbones(self) -> list[Backbone]:
        """Return the anchors, smallest first."""
        return [anchor for anchor in self.anchors if isinstance(anchor, Backbone)]

    def affine(self, layer: str) -> nn.Linear | nn.Conv2d:
        """Return the affine map of a stitching layer by its state-dict key."""
        module = self.get_submodule(layer)
        assert isinstance(module, nn.Linear | nn.Conv2d)
        return module

    def fold_batch_norm(self) -> None:
        """Fold batch normalisation into the layers before it, for serving; in place."""
        for module in (*self.anchors.modules(), *self.stitch_layers.modules()):
            if isinstance(module, FoldsBatchNorm):
                module.fold_batch_norm()

    def forward(self, images: Tensor, stitch: int) -> Tensor:
        """Return the logits [B, num_classes] of images [B, C, H, W] on the stitch with this id.

        Raises `KeyError` for an id that the family does not have.
        """
        front, steps, end, final_norm = self._steps[stitch]
        x = front.embed(images)
        for step in steps:
            x = step(x)
        return end.classify(x, final_norm=final_norm)


def _nest(layers: Layers) -> nn.Module:
    """Return the layers as nested module lists."""
    if isinstance(layers, nn.Module):
        return layers
    return nn.ModuleList(_nest(inner) for inner in layers)


def _resolve_route(
    stitch: Stitch, backbones: Sequence[Backbone], modules: dict[str, nn.Module]
) -> tuple[Backbone, tuple[nn.Module, ...], Backbone, bool]:
    """Return the front anchor, the steps, the end anchor and the final-norm flag of a stitch.

    They are looked up once, so that a change of stitch costs one dictionary access.
    """
    steps: list[nn.Module] = []
    for segment, layer in zip(stitch.segments, (*stitch.layers, None), strict=True):
        own = backbones[segment.anchor].steps()
        steps.extend(find_part(own, first, size) for first, size in segment.parts)
        if layer is not None:
            steps.append(modules[layer.removesuffix(".transform")])
    return backbones[stitch.front], tuple(steps), backbones[stitch.end], stitch.final_norm


class Backbone(nn.Module, ABC):
    """The interface of every anchor: embedding, steps, classifier.

    The downsamplings of a hierarchical network are steps, too, so that a position in `steps` is
    sufficient to describe where a route enters or leaves an anchor.
    """

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Return the input of step 0 for images [B, C, H, W]."""

    @abstractmethod
    def steps(self) -> Sequence[nn.Module]:
        """Return the blocks and the downsamplings between stages, in order."""

    @abstractmethod
    def classify(self, x: Tensor, *, final_norm: bool) -> Tensor:
        """Return the logits [B, num_classes] of the last step's output."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, num_classes] of images [B, C, H, W]."""
        x = self.embed(images)
        for step in self.steps():
            x = step(x)
        return self.classify(x, final_norm=True)


def feature_rows(x: Tensor) -> Tensor:
    """Return tokens [B, T, D] as rows [B * T, D], or maps [B, D, h, w] as [B * h * w, D]."""
    if x.dim() == 4:
        return x.permute(0, 2, 3, 1).flatten(0, 2)
    return x.flatten(0, 1)


Layer = TypeVar("Layer", bound=nn.Module)


@runtime_checkable
class FoldsBatchNorm(Protocol):
    """A module whose batch normalisation can be folded away after training."""

    def fold_batch_norm(self) -> None:
        """Fold the running statistics into the layers before the normalisation; in place."""


def fold(layer: Layer, norm: nn.Module) -> tuple[Layer, nn.Module]:
    """Return one layer that equals both in eval mode, and an identity in place of the norm.

    Other kinds of layers and norms are returned unchanged.
    """
    if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
        return cast(Layer, fuse_conv_bn_eval(layer, norm)), nn.Identity()
    if isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
        return cast(Layer, fuse_linear_bn_eval(layer, norm)), nn.Identity()
    return layer, norm


class ConvConfig(BaseModel):
    """Shape of a convolutional anchor, whose steps are its blocks on maps [B, D, h, w]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    depths: tuple[int, ...]

    @property
    def layout(self) -> Literal["map"]:
        """Layout of the features between steps."""
        return "map"

    @property
    def total_steps(self) -> int:
        """Number of steps of the anchor."""
        return sum(self.depths)

    def span(self, stage: int, block: int) -> tuple[int, int]:
        """Return the first and the last step of a stage's block."""
        step = sum(self.depths[:stage]) + block
        return step, step

    def first_residual(self, stage: int) -> int:
        """Return the first block of a stage whose output has its input's shape."""
        return 1

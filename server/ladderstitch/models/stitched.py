"""The stitchable model: every network of a family in one set of weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ladderstitch.models.route import Stitch
from ladderstitch.models.vit import ConvStem, Vit


class StitchingLayer(nn.Module):
    """Affine map from one anchor's tokens to another's, [B, T, D_front] -> [B, T, D_end]."""

    def __init__(self, front_dim: int, end_dim: int) -> None:
        super().__init__()
        self.transform = nn.Linear(front_dim, end_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.transform(x)


class StitchedModel(nn.Module):
    """Anchors and stitching layers, loaded once; `forward` takes the route to run.

    Calls with different stitches share every weight and no state, so any two may be in flight at
    once. State-dict keys are the published ones: `anchors.{a}.<timm key>` and
    `stitch_layers.{pair}.{layer}.transform.{weight,bias}`.
    """

    def __init__(
        self,
        anchors: Sequence[Vit],
        stitch_layers: Sequence[Sequence[StitchingLayer]],
        stitches: Sequence[Stitch],
    ) -> None:
        super().__init__()
        self.anchors = nn.ModuleList(anchors)
        self.stitch_layers = nn.ModuleList(nn.ModuleList(layers) for layers in stitch_layers)
        self.stitches = tuple(stitches)
        modules = dict(self.named_modules())
        self._steps = {s.id: _resolve(s, modules) for s in self.stitches}

    def vits(self) -> list[Vit]:
        """The anchors, smallest first."""
        return [anchor for anchor in self.anchors if isinstance(anchor, Vit)]

    def linear(self, layer: str) -> nn.Linear:
        """The affine map of a stitching layer, by its state-dict key."""
        linear = self.get_submodule(layer)
        assert isinstance(linear, nn.Linear)
        return linear

    def fold_batch_norm(self) -> None:
        """Fold batch normalisation into the stems' convolutions, for serving; in place."""
        for vit in self.vits():
            if isinstance(vit.patch_embed, ConvStem):
                vit.patch_embed.fold_batch_norm()

    def forward(self, images: Tensor, stitch: int) -> Tensor:
        """[B, C, H, W] images -> [B, num_classes] logits of the network `stitch` (an id).

        Raises `KeyError` for an id that the family does not have.
        """
        front, blocks, end, final_norm = self._steps[stitch]
        x = front.embed(images)
        for block in blocks:
            x = block(x)
        return end.classify(x, final_norm=final_norm)


def _resolve(
    stitch: Stitch, modules: dict[str, nn.Module]
) -> tuple[Vit, tuple[nn.Module, ...], Vit, bool]:
    """The modules that a stitch runs, looked up once so that switching costs one dict access."""
    steps: list[nn.Module] = []
    for segment, layer in zip(stitch.segments, (*stitch.layers, None), strict=True):
        anchor = modules[f"anchors.{segment.anchor}"]
        assert isinstance(anchor, Vit)
        steps.extend(list(anchor.blocks)[segment.first : segment.last + 1])
        if layer is not None:
            steps.append(modules[layer])
    front, end = modules[f"anchors.{stitch.front}"], modules[f"anchors.{stitch.end}"]
    assert isinstance(front, Vit)
    assert isinstance(end, Vit)
    return front, tuple(steps), end, stitch.final_norm

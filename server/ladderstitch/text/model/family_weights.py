"""The weights of a family in one set of files: its anchors, and its stitching layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ladderstitch.bundles import check_tensors
from ladderstitch.text.model.family import DecoderFamily
from ladderstitch.text.model.weight_reader import Weights
from ladderstitch.text.model.weights import check_weights, expected_shapes

ANCHORS, STITCHES = "anchors.", "stitches."
"""Prefixes of the tensors of smaller anchors, by number, and of stitching layers."""


class WeightsView:
    """The tensors of some weights whose names begin with a prefix, by the rest of their names.

    With an empty prefix, those that belong to no smaller anchor and no stitching layer.
    """

    def __init__(self, weights: Weights, prefix: str) -> None:
        self._weights, self._prefix = weights, prefix

    def names(self) -> Sequence[str]:
        """Return the names of all tensors."""
        names = self._weights.names()
        if not self._prefix:
            return [name for name in names if not name.startswith((ANCHORS, STITCHES))]
        cut = len(self._prefix)
        return [name[cut:] for name in names if name.startswith(self._prefix)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; raises `BundleError` if it is missing."""
        return self._weights.shape(self._prefix + name)

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        """Return the given rows and columns of a tensor; unset: all of them."""
        return self._weights.read(self._prefix + name, rows, columns)


def anchor_prefix(anchor: int, num_anchors: int) -> str:
    """Return the prefix of an anchor's tensors in a bundle; the last, the largest, has none."""
    return "" if anchor == num_anchors - 1 else f"{ANCHORS}{anchor}."


def anchor_weights(weights: Weights, num_anchors: int) -> list[Weights]:
    """Return the weights of each anchor of a family, the largest one last."""
    return [
        WeightsView(weights, anchor_prefix(anchor, num_anchors)) for anchor in range(num_anchors)
    ]


def stitch_weights(weights: Weights) -> Weights:
    """Return the weights of the stitching layers of a family."""
    return WeightsView(weights, STITCHES)


def check_family_weights(weights: Weights, family: DecoderFamily) -> None:
    """Raise `BundleError` naming every missing, unknown and mis-shaped tensor of a family."""
    maps = stitch_weights(weights)
    parts = anchor_weights(weights, len(family.anchors))
    for part, config in zip(parts, family.anchors, strict=True):
        check_weights(part, config)
    expected = {name.removeprefix(STITCHES): shape for name, shape in map_shapes(family).items()}
    check_tensors(
        expected, {name: maps.shape(name) for name in maps.names()}, where="stitching layers"
    )


def map_shapes(family: DecoderFamily) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of the stitching layers, as a bundle has them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in family.maps():
        shapes |= {STITCHES + name.weight: shape, STITCHES + name.bias: shape[:1]}
    return shapes


def family_shapes(family: DecoderFamily) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of a family, as a bundle stores them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for number, anchor in enumerate(family.anchors):
        prefix = anchor_prefix(number, len(family.anchors))
        shapes |= {prefix + name: shape for name, shape in expected_shapes(anchor).items()}
    return shapes | map_shapes(family)

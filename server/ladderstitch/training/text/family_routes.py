"""The routes of a stitched language family: which anchor runs each layer, and their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ladderstitch.text.model.family import LayerRange


@dataclass(frozen=True, slots=True)
class Route:
    """A path: the layers before `layer` of the anchor `front`, then those of the anchor `end`.

    A path of one anchor has it as `front` and `end`, and layer 0.
    """

    front: int
    end: int
    layer: int = 0

    @classmethod
    def of_anchor(cls, anchor: int) -> Route:
        """Return the path that runs all layers of one anchor."""
        return cls(anchor, anchor)

    @property
    def is_stitched(self) -> bool:
        """Whether the path changes anchor."""
        return self.layer > 0

    def anchor(self, layer: int) -> int:
        """Return the anchor whose layer of this number the path runs."""
        return self.front if layer < self.layer else self.end

    def name(self, names: Sequence[str]) -> str:
        """Return the path's name, e.g. `large`, or `small-3+large` with 3 layers of `small`."""
        end = names[self.end]
        return f"{names[self.front]}-{self.layer}+{end}" if self.is_stitched else end

    def segments(self, layers: int) -> tuple[LayerRange, ...]:
        """Return the path as the route of a bundle's manifest."""
        end = LayerRange(anchor=self.end, first=self.layer, last=layers - 1)
        if not self.is_stitched:
            return (end,)
        return LayerRange(anchor=self.front, first=0, last=self.layer - 1), end


@dataclass(frozen=True, slots=True)
class Span:
    """A number of successive tokens that take the same path."""

    route: Route
    tokens: int


def stitched_routes(front: int, end: int, layers: int) -> tuple[Route, ...]:
    """Return the paths from an anchor to another, by the layer where they change."""
    return tuple(Route(front, end, layer) for layer in range(1, layers))


def anchor_pairs(anchors: int) -> tuple[tuple[int, int], ...]:
    """Return the ordered pairs of anchors; those to a larger anchor first."""
    numbers = range(anchors)
    up = [(front, end) for front in numbers for end in numbers if front < end]
    return (*up, *((end, front) for front, end in up))


def all_routes(anchors: int, layers: int) -> tuple[Route, ...]:
    """Return every path of a family in the order of their ids: the anchors, then the stitched."""
    single = tuple(Route.of_anchor(anchor) for anchor in range(anchors))
    return single + tuple(
        route for pair in anchor_pairs(anchors) for route in stitched_routes(*pair, layers)
    )

"""The routes of a stitched language family: which anchor runs each layer, and their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ladderstitch.text.model.family import DecoderFamily, LayerRange


@dataclass(frozen=True, slots=True)
class Route:
    """A path: the first layers of the anchor `front`, then those of `end` from `layer` on.

    A path of one anchor has it as `front` and `end`, and layer 0.
    """

    front: int
    end: int
    layer: int = 0
    run: int = -1
    """The number of layers of `front` that it runs; negative: as many as `layer`."""

    def __post_init__(self) -> None:
        """Set `run` if it is negative."""
        if self.run < 0:
            object.__setattr__(self, "run", self.layer)

    @classmethod
    def of_anchor(cls, anchor: int) -> Route:
        """Return the path that runs all layers of one anchor."""
        return cls(anchor, anchor)

    @property
    def is_stitched(self) -> bool:
        """Whether the path changes anchor."""
        return self.layer > 0

    def name(self, names: Sequence[str]) -> str:
        """Return the path's name, e.g. `large`, or `small-3+large` with 3 layers of `small`."""
        end = names[self.end]
        return f"{names[self.front]}-{self.run}+{end}" if self.is_stitched else end

    def segments(self, family: DecoderFamily) -> tuple[LayerRange, ...]:
        """Return the path as the route of a bundle's manifest."""
        last = family.depths[self.end] - 1
        end = LayerRange(anchor=self.end, first=self.layer, last=last)
        if not self.is_stitched:
            return (end,)
        return LayerRange(anchor=self.front, first=0, last=self.run - 1), end


@dataclass(frozen=True, slots=True)
class Span:
    """A number of successive tokens that take the same path."""

    route: Route
    tokens: int


def stitched_routes(family: DecoderFamily, front: int, end: int) -> tuple[Route, ...]:
    """Return the paths from an anchor to another, by the layer where they change."""
    return tuple(Route(front, end, layer, run) for run, layer in family.changes(front, end))


def anchor_pairs(anchors: int) -> tuple[tuple[int, int], ...]:
    """Return the ordered pairs of anchors; those to a larger anchor first."""
    numbers = range(anchors)
    up = [(front, end) for front in numbers for end in numbers if front < end]
    return (*up, *((end, front) for front, end in up))


def all_routes(family: DecoderFamily) -> tuple[Route, ...]:
    """Return every path of a family in the order of their ids: the anchors, then the stitched."""
    anchors = len(family.anchors)
    single = tuple(Route.of_anchor(anchor) for anchor in range(anchors))
    return single + tuple(
        route for pair in anchor_pairs(anchors) for route in stitched_routes(family, *pair)
    )

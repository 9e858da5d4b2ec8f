"""A family of decoders with stitching layers between them, as data: anchors, routes and planes.

An *anchor* is a whole decoder. The anchors of a family differ in width; their layers correspond to
each other one to one, and their keys and values have one shape. A *route* runs the first layers of
one anchor and the later ones of another (SN-Net, arXiv 2302.06586, with layers instead of blocks).
The cache has a *plane* for each layer of each anchor: layer i of different anchors writes different
keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from pydantic import BaseModel, ConfigDict, Field

from ladderstitch.text.model.config import DecoderConfig

ANCHOR_FIELDS = {"hidden_size", "intermediate_size", "heads", "tied_head"}
"""The fields in which the anchors of a family may differ."""


class LayerRange(BaseModel):
    """The part of a route in one anchor: its layers `first` to `last`, both included."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    anchor: int = Field(ge=0)
    first: int = Field(ge=0)
    last: int = Field(ge=0)


Route = tuple[LayerRange, ...]
"""The parts of a path in order; empty: all layers of the largest anchor."""


@dataclass(frozen=True, slots=True)
class Plane:
    """The keys and values of one layer of one anchor."""

    anchor: int
    layer: int


@dataclass(frozen=True, slots=True)
class MapName:
    """A stitching layer: from the stream before a layer of one anchor to that of another one."""

    front: int
    end: int
    layer: int

    @property
    def weight(self) -> str:
        """Name of its matrix [D_end, D_front] among the stitching layers of a bundle."""
        return f"{self.front}.{self.end}.{self.layer}.weight"

    @property
    def bias(self) -> str:
        """Name of its bias [D_end]."""
        return f"{self.front}.{self.end}.{self.layer}.bias"


@dataclass(frozen=True, slots=True)
class DecoderFamily:
    """The anchors of a model, the largest one last; a plain model has one."""

    anchors: tuple[DecoderConfig, ...]

    @property
    def largest(self) -> DecoderConfig:
        """The largest anchor."""
        return self.anchors[-1]

    @property
    def layers(self) -> int:
        """The number of layers of every anchor."""
        return self.largest.layers

    @property
    def num_planes(self) -> int:
        """The number of planes of the cache."""
        return len(self.anchors) * self.layers

    def plane_number(self, anchor: int, layer: int = 0) -> int:
        """Return the place of a plane in the cache."""
        return anchor * self.layers + layer

    def complete(self, route: Route) -> Route:
        """Return the route itself, or all layers of the largest anchor if it is empty."""
        return route or (LayerRange(anchor=len(self.anchors) - 1, first=0, last=self.layers - 1),)

    def planes(self, route: Route) -> tuple[Plane, ...]:
        """Return the planes that a route writes, in order; one for each layer."""
        return tuple(
            Plane(part.anchor, layer)
            for part in self.complete(route)
            for layer in range(part.first, part.last + 1)
        )

    def missing_planes(self, source: Route, target: Route) -> tuple[Plane, ...]:
        """Return the planes that a target route reads and a source route does not write."""
        written = set(self.planes(source))
        return tuple(plane for plane in self.planes(target) if plane not in written)

    def maps(self) -> Iterator[tuple[MapName, tuple[int, int]]]:
        """Yield all stitching layers with the shapes [D_end, D_front] of their matrices."""
        for front, end in (
            (f, e) for f in range(len(self.anchors)) for e in range(len(self.anchors)) if f != e
        ):
            shape = self.anchors[end].hidden_size, self.anchors[front].hidden_size
            for layer in range(1, self.layers):
                yield MapName(front, end, layer), shape

    def find_problem(self, routes: Mapping[str, Route]) -> str | None:
        """Return what is wrong with the anchors or a route by name, None if nothing is."""
        if len(self.anchors) > 1 and not all(anchor.is_llama for anchor in self.anchors):
            return "anchors: expected Llama's layers, the only ones that can be stitched"
        shared = self.largest.model_dump(exclude=ANCHOR_FIELDS)
        for number, anchor in enumerate(self.anchors[:-1]):
            own = anchor.model_dump(exclude=ANCHOR_FIELDS)
            if wrong := {name for name in shared if own[name] != shared[name]}:
                return f"anchors.{number}: expected {', '.join(sorted(wrong))} as in config"
        for name, route in routes.items():
            if not self._is_complete(self.complete(route)):
                return (
                    f"paths.{name}.route: expected layers 0 to {self.layers - 1} once, in parts of "
                    f"different anchors among {len(self.anchors)}, got {route}"
                )
        return None

    def _is_complete(self, route: Route) -> bool:
        layers = [layer for part in route for layer in range(part.first, part.last + 1)]
        return (
            layers == list(range(self.layers))
            and all(part.anchor < len(self.anchors) for part in route)
            and all(part.first <= part.last for part in route)
            and all(a.anchor != b.anchor for a, b in pairwise(route))
        )

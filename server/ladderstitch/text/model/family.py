"""A family of decoders with stitching layers between them, as data: anchors, routes and planes.

An *anchor* is a whole decoder. The anchors of a family differ in width and may differ in depth;
their keys and values have one shape. A *route* runs the first layers of one anchor and the later
ones of another (SN-Net, arXiv 2302.06586, with layers instead of blocks). The cache has a *plane*
for each layer of each anchor: layer i of different anchors writes different keys and values.

Layers are paired by their relative depth: layer i of n with layer ceil(i m / n) of m, at most the
last one; for equal depths that is layer i. SN-Net rounds down between blocks of stages of different
depths; rounded up, no layer but the first is paired with an embedding. A stitching layer maps the
stream that the paired layer reads to that which layer i reads. A route changes anchor at the first
of the layers that are paired with the same one, so that every plane that it does not write is
paired with one that it writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, permutations

from pydantic import BaseModel, ConfigDict, Field

from ladderstitch.text.model.config import DecoderConfig

ANCHOR_FIELDS = {"hidden_size", "intermediate_size", "layers", "heads", "tied_head"}
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
    front_layer: int
    layer: int
    """The layer of the end anchor."""

    @property
    def stem(self) -> str:
        """What the names of its tensors have in common."""
        is_same = self.front_layer == self.layer
        layers = f"{self.layer}" if is_same else f"{self.front_layer}-{self.layer}"
        return f"{self.front}.{self.end}.{layers}"

    @property
    def weight(self) -> str:
        """Name of its matrix [D_end, D_front] among the stitching layers of a bundle."""
        return f"{self.stem}.weight"

    @property
    def bias(self) -> str:
        """Name of its bias [D_end]."""
        return f"{self.stem}.bias"


@dataclass(frozen=True, slots=True)
class DecoderFamily:
    """The anchors of a model, the largest one last; a plain model has one."""

    anchors: tuple[DecoderConfig, ...]

    @property
    def largest(self) -> DecoderConfig:
        """The largest anchor."""
        return self.anchors[-1]

    @property
    def width(self) -> int:
        """The largest width of a residual stream, of whichever anchor."""
        return max(anchor.hidden_size for anchor in self.anchors)

    @property
    def depths(self) -> tuple[int, ...]:
        """The number of layers of each anchor."""
        return tuple(anchor.layers for anchor in self.anchors)

    @property
    def deepest(self) -> int:
        """The largest number of layers of an anchor."""
        return max(self.depths)

    @property
    def num_planes(self) -> int:
        """The number of planes of the cache."""
        return sum(self.depths)

    def plane_number(self, anchor: int, layer: int = 0) -> int:
        """Return the place of a plane in the cache."""
        return sum(self.depths[:anchor]) + layer

    def paired_layer(self, front: int, end: int, layer: int) -> int:
        """Return the layer of the anchor `front` that is paired with a layer of `end`."""
        return min(self.depths[front] - 1, -(-layer * self.depths[front] // self.depths[end]))

    def map_name(self, front: int, end: int, layer: int) -> MapName:
        """Return the stitching layer to the stream before a layer of the anchor `end`."""
        return MapName(front, end, self.paired_layer(front, end, layer), layer)

    def changes(self, front: int, end: int) -> tuple[tuple[int, int], ...]:
        """Return where a route may change from one anchor to another.

        Each entry has the number of layers of `front` that it has run, and the first layer of
        `end`.
        """
        found: dict[int, int] = {}
        for layer in range(1, self.depths[end]):
            found.setdefault(self.paired_layer(front, end, layer), layer)
        return tuple((run, layer) for run, layer in found.items() if run)

    def complete(self, route: Route) -> Route:
        """Return the route itself, or all layers of the largest anchor if it is empty."""
        last = len(self.anchors) - 1
        return route or (LayerRange(anchor=last, first=0, last=self.depths[last] - 1),)

    def planes(self, route: Route) -> tuple[Plane, ...]:
        """Return the planes that a route writes, in order; one for each layer."""
        return tuple(
            Plane(part.anchor, layer)
            for part in self.complete(route)
            for layer in range(part.first, part.last + 1)
        )

    def all_planes(self) -> tuple[Plane, ...]:
        """Return all planes in the order of the cache."""
        return tuple(
            Plane(anchor, layer)
            for anchor in range(len(self.anchors))
            for layer in range(self.depths[anchor])
        )

    def missing_planes(self, source: Route, target: Route) -> tuple[Plane, ...]:
        """Return the planes that a target route reads and a source route does not write."""
        written = set(self.planes(source))
        return tuple(plane for plane in self.planes(target) if plane not in written)

    def origin(self, plane: Plane, source: Route) -> Plane | None:
        """Return the plane of a source route with which a plane that it does not write is paired.

        Its stream is mapped. None: the route has none.
        """
        written = self.planes(source)
        for part in self.complete(source):
            paired = self.paired_layer(part.anchor, plane.anchor, plane.layer)
            if part.anchor != plane.anchor and Plane(part.anchor, paired) in written:
                return Plane(part.anchor, paired)
        return None

    def maps(self) -> Iterator[tuple[MapName, tuple[int, int]]]:
        """Yield all stitching layers with the shapes [D_end, D_front] of their matrices."""
        for front, end in (
            (f, e) for f in range(len(self.anchors)) for e in range(len(self.anchors)) if f != e
        ):
            shape = self.anchors[end].hidden_size, self.anchors[front].hidden_size
            for layer in range(1, self.depths[end]):
                yield self.map_name(front, end, layer), shape

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
                return f"paths.{name}.route: {self._describe_routes()}, got {route}"
        return None

    def _describe_routes(self) -> str:
        """Return what is expected of a route."""
        among = f"in parts of different anchors among {len(self.anchors)}"
        if len(set(self.depths)) == 1:
            return f"expected layers 0 to {self.deepest - 1} once, {among}"
        pairs = [
            f"{front} to {end} after (layers) at (layer) {', '.join(map(str, joints))}"
            for front, end in permutations(range(len(self.anchors)), 2)
            if (joints := self.changes(front, end))
        ]
        return (
            f"expected layer 0 to the last one of an anchor, {among}, that change from "
            f"{'; '.join(pairs)}"
        )

    def _is_complete(self, route: Route) -> bool:
        if not all(part.anchor < len(self.anchors) and part.first <= part.last for part in route):
            return False
        is_whole = route[0].first == 0 and route[-1].last == self.depths[route[-1].anchor] - 1
        joins = all(
            a.anchor != b.anchor and (a.last + 1, b.first) in self.changes(a.anchor, b.anchor)
            for a, b in pairwise(route)
        )
        written = self.planes(route) if is_whole and joins else ()
        return bool(written) and all(
            plane in written or self.origin(plane, route) for plane in self.all_planes()
        )

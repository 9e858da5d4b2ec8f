"""The forward pass of a route through several anchors, and the translation of keys and values.

A stitching layer S x = W x + b maps the residual stream of one anchor to that of another. It
commutes with the reduction p that is in flight, S(x + sum p) = S x + sum W p, so that a ladder
crosses it without waiting: what arrives is mapped, or, if the end anchor is the narrower one, what
is sent.

The same map translates the cache. For a token that did not run layer m of an anchor, the keys and
values there are those of the mapped stream that layer m of the other anchor read:
K, V = W_kv norm(S_m x_m), rotated by the true position. No attention is computed, and layers are
independent of each other. Layer 0 needs no map: it reads the anchor's own embedding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch.text.comm.base import Communicator
from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.family import DecoderFamily, LayerRange, MapName, Plane, Route
from ladderstitch.text.model.residual import LayerPlan
from ladderstitch.text.model.residual_stream import AffineMap, ResidualStream
from ladderstitch.text.model.transformer import Transformer
from ladderstitch.text.model.weight_reader import Weights


class BoundaryCache:
    """The streams that the layers of each anchor read, by slot of the paged cache.

    A layer's attention reads [T, D] for T tokens: for a ladder without the last sub-block. Layer 0
    is not kept, as embeddings are computed again.
    """

    def __init__(
        self,
        family: DecoderFamily,
        slots: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._memory = [
            torch.zeros(anchor.layers - 1, slots, anchor.hidden_size, dtype=dtype, device=device)
            for anchor in family.anchors
        ]

    @property
    def bytes(self) -> int:
        """Memory of the cache in bytes."""
        return sum(memory.nbytes for memory in self._memory)

    def store(self, plane: Plane, batch: Batch, x: Tensor) -> None:
        """Store the stream [T, D] that a layer reads for the new tokens of a batch."""
        if plane.layer:
            self._memory[plane.anchor][plane.layer - 1][batch.new_slots] = x

    def load(self, plane: Plane, batch: Batch) -> Tensor:
        """Return the stream [T, D] that a layer other than 0 read for the tokens of a batch."""
        return self._memory[plane.anchor][plane.layer - 1][batch.new_slots]


class FamilyModel(ABC):
    """All anchors of a family on one rank, with what translates keys and values between them."""

    def __init__(self, family: DecoderFamily, boundaries: BoundaryCache) -> None:
        self.family, self.boundaries = family, boundaries
        self._origins: dict[tuple[Route, Route | None], dict[Plane, Plane]] = {}

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Memory of all weights in bytes."""

    @torch.inference_mode()
    def translate(
        self, batch: Batch, cache: PagedCache, source: Route, target: Route, comm: Communicator
    ) -> None:
        """Fill the planes that a target route reads and a source route did not write.

        The tokens of the batch were computed on the source route. Raises `PeerLost` if a peer died.
        """
        self._fill(self._find_origins(source, target), batch, cache, comm)

    @torch.inference_mode()
    def translate_all(
        self, batch: Batch, cache: PagedCache, source: Route, comm: Communicator
    ) -> None:
        """Fill all planes that a source route did not write, as `translate` does."""
        self._fill(self._find_origins(source, None), batch, cache, comm)

    def _find_origins(self, source: Route, target: Route | None) -> dict[Plane, Plane]:
        """Return the origin of each plane of a target route that a source route did not write.

        Without a target, of all planes.
        """
        if (source, target) not in self._origins:
            family, written = self.family, set(self.family.planes(source))
            wanted = family.all_planes() if target is None else family.planes(target)
            found: dict[Plane, Plane] = {}
            for plane in wanted:
                if plane not in written:
                    origin = family.origin(plane, source)
                    assert origin is not None, "a valid route has an origin of every plane"
                    found[plane] = origin
            self._origins[source, target] = found
        return self._origins[source, target]

    @abstractmethod
    def _fill(
        self, origins: Mapping[Plane, Plane], batch: Batch, cache: PagedCache, comm: Communicator
    ) -> None:
        """Fill planes, each from the stream that the layer of its origin read."""


class StitchedModel(FamilyModel):
    """All anchors of a family on one rank, with their stitching layers, whole on every rank."""

    def __init__(
        self,
        family: DecoderFamily,
        anchors: Sequence[Transformer],
        maps: Mapping[MapName, AffineMap],
        boundaries: BoundaryCache,
    ) -> None:
        super().__init__(family, boundaries)
        self.anchors, self.maps = tuple(anchors), maps

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights in bytes."""
        return map_bytes(self.maps) + sum(anchor.weight_bytes for anchor in self.anchors)

    def _fill(
        self, origins: Mapping[Plane, Plane], batch: Batch, cache: PagedCache, comm: Communicator
    ) -> None:
        """Fill planes, each from the stream that the layer of its origin read."""
        for plane, origin in origins.items():
            anchor = self.anchors[plane.anchor]
            if plane.layer:
                map_ = self.maps[self.family.map_name(origin.anchor, plane.anchor, plane.layer)]
                x = F.linear(self.boundaries.load(origin, batch), map_.matrix, map_.bias)
            else:
                x = anchor.embed(batch.tokens, comm)
            layer, kind = anchor.layers[plane.layer], anchor.config.layer_rotations[plane.layer]
            layer.append_keys(x, batch, anchor.rotations(batch, cache)[kind], cache)


class FamilyPath(ABC):
    """One route through a family; it takes the place of `transformer.Transformer`."""

    def __init__(self, model: FamilyModel, route: Route) -> None:
        self.model, self.route = model, model.family.complete(route)
        self.config = model.family.largest

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights of the whole family in bytes."""
        return self.model.weight_bytes

    @abstractmethod
    def forward(
        self, batch: Batch, cache: PagedCache, plans: Sequence[LayerPlan], comm: Communicator
    ) -> Tensor:
        """Return logits [L, V_r] for the batch's L output rows, as `Transformer.forward` does."""


class StitchedPath(FamilyPath):
    """A route whose layers run one by one in torch, on any device and number of ranks."""

    def __init__(self, model: StitchedModel, route: Route) -> None:
        super().__init__(model, route)
        self._anchors, self._maps = model.anchors, model.maps

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._anchors[-1].device

    @torch.inference_mode()
    def forward(
        self, batch: Batch, cache: PagedCache, plans: Sequence[LayerPlan], comm: Communicator
    ) -> Tensor:
        """Return logits [L, V_r] for the batch's L output rows, as `Transformer.forward` does."""
        anchors, first = self._anchors, self.route[0].anchor
        stream = ResidualStream(anchors[first].embed(batch.tokens, comm), comm)
        for part, following in zip(self.route, (*self.route[1:], None), strict=True):
            self._run_part(part, following, stream, batch, cache, plans)
        return anchors[self.route[-1].anchor].logits(stream, batch)

    def _run_part(
        self,
        part: LayerRange,
        following: LayerRange | None,
        stream: ResidualStream,
        batch: Batch,
        cache: PagedCache,
        plans: Sequence[LayerPlan],
    ) -> None:
        """Run the layers of one part, and the stitching layer to the following part, if any."""
        anchor = self._anchors[part.anchor]
        rotations = anchor.rotations(batch, cache)
        crossing = None
        if following is not None:
            name = self.model.family.map_name(part.anchor, following.anchor, following.first)
            crossing = self._maps[name]
        for number in range(part.first, part.last + 1):
            plan, kind = plans[number], anchor.config.layer_rotations[number]
            plane = Plane(part.anchor, number)
            self.model.boundaries.store(plane, batch, stream.read(plan.lag))
            outgoing = crossing if number == part.last else None
            anchor.layers[number](plan, stream, batch, rotations[kind], cache, outgoing)


def load_maps(
    weights: Weights, family: DecoderFamily, dtype: torch.dtype, device: torch.device | str
) -> dict[MapName, AffineMap]:
    """Return all stitching layers of a family."""
    return {
        name: AffineMap(
            weights.read(name.weight).to(device, dtype), weights.read(name.bias).to(device, dtype)
        )
        for name, _ in family.maps()
    }


def map_bytes(maps: Mapping[MapName, AffineMap]) -> int:
    """Return the memory of stitching layers in bytes."""
    return sum(map_.matrix.nbytes + map_.bias.nbytes for map_ in maps.values())

"""Routes through several anchors in ONNX Runtime, in the segments of `segments.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, permutations

import onnxruntime
import torch
from torch import Tensor

from ladderstitch.runtime.sessions import open_rank_session
from ladderstitch.text.comm.base import Communicator
from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.cache_translator import CacheTranslator
from ladderstitch.text.model.family import DecoderFamily, MapName, Plane, Route
from ladderstitch.text.model.onnx_attention import Array
from ladderstitch.text.model.residual import LayerPlan
from ladderstitch.text.model.residual_stream import AffineMap
from ladderstitch.text.model.segments import (
    FACTORS,
    Arrays,
    Projected,
    SegmentedTransformer,
    crossing_segment,
)
from ladderstitch.text.model.stitched import BoundaryCache, FamilyModel, FamilyPath, map_bytes
from ladderstitch.text.model.weights import RankWeights

CROSSING_OUTPUTS = ("next_x", "next_p", "qk", "v")


class FamilySegments(FamilyModel):
    """All anchors of a family on one rank of a CPU, in sessions that hold the weights."""

    def __init__(
        self,
        family: DecoderFamily,
        anchors: Sequence[SegmentedTransformer],
        weights: Sequence[RankWeights],
        maps: Mapping[MapName, AffineMap],
        boundaries: BoundaryCache,
        threads: int,
    ) -> None:
        """Open the sessions of the stitching layers; all anchors must keep lagged streams.

        Nothing keeps `weights` and `maps`.
        """
        super().__init__(family, boundaries)
        self.anchors = tuple(anchors)
        self.crossings: dict[MapName, onnxruntime.InferenceSession] = {
            name: open_rank_session(
                crossing_segment(
                    map_, weights[name.end].layers[name.layer], anchors[name.end].config
                ),
                threads,
            )
            for name, map_ in maps.items()
        }
        self._translators = {
            (front, end): CacheTranslator(
                {n.layer: m for n, m in maps.items() if (n.front, n.end) == (front, end)},
                weights[end].layers,
                anchors[end].config,
                threads,
            )
            for front, end in permutations(range(len(anchors)), 2)
        }
        translators = sum(held.weight_bytes for held in self._translators.values())
        self._weight_bytes = (
            map_bytes(maps) + translators + sum(anchor.weight_bytes for anchor in anchors)
        )

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights in bytes."""
        return self._weight_bytes

    def _fill(
        self, origins: Mapping[Plane, Plane], batch: Batch, cache: PagedCache, comm: Communicator
    ) -> None:
        """Fill planes, each from the stream that the layer of its origin read.

        One call translates all planes of an anchor whose streams are of the same other anchor.
        """
        slots, streams = batch.cache_index().new_slots, dict[tuple[int, int], dict[int, Array]]()
        for plane, origin in origins.items():
            layers = streams.setdefault((origin.anchor, plane.anchor), {})
            if plane.layer:
                layers[plane.layer] = self.boundaries.load(origin, batch).numpy()
            else:
                layers[0] = self.anchors[plane.anchor].embed(batch)
        positions = batch.positions.numpy()
        for (front, end), layers in streams.items():
            translator, tables = self._translators[front, end], self.anchors[end].tables
            for layer, kv in translator.translate(layers, positions, tables).items():
                keys, values = cache.arrays(self.family.plane_number(end, layer))
                keys[slots], values[slots] = kv


class SegmentedPath(FamilyPath):
    """A route whose layers run in segments, from one attention to the next."""

    def __init__(self, model: FamilySegments, route: Route) -> None:
        super().__init__(model, route)
        self._segments, self._planes = model, model.family.planes(self.route)

    @torch.inference_mode()
    def forward(
        self, batch: Batch, cache: PagedCache, plans: Sequence[LayerPlan], comm: Communicator
    ) -> Tensor:
        """Return logits [L, V] for the batch's L output rows, as `Transformer.forward` does."""
        anchors, planes = self._segments.anchors, self._planes
        first = anchors[planes[0].anchor]
        positions = first.positions(batch)
        stream, projected = first.start(batch, positions)
        for plane, following in pairwise(planes):
            self._store(plane, batch, stream, plans)
            attended = self._attend(plane, cache, batch, projected)
            anchor = anchors[plane.anchor]
            stream, projected = anchor.advance(plane.layer, stream, attended, positions, plans)
            if following.anchor != plane.anchor:
                stream, projected = self._cross(plane, following, stream, positions, plans)
        last = planes[-1]
        self._store(last, batch, stream, plans)
        attended = self._attend(last, cache, batch, projected)
        return anchors[last.anchor].finish(stream, attended, batch, plans)

    def _attend(self, plane: Plane, cache: PagedCache, batch: Batch, projected: Projected) -> Array:
        number = self.model.family.plane_number(plane.anchor, plane.layer)
        return self._segments.anchors[plane.anchor].attend(number, cache, batch, projected)

    def _cross(
        self,
        plane: Plane,
        following: Plane,
        stream: Arrays,
        positions: Arrays,
        plans: Sequence[LayerPlan],
    ) -> tuple[Arrays, Projected]:
        """Return the stream of the following plane's anchor, and what its attention reads."""
        name = self.model.family.map_name(plane.anchor, following.anchor, following.layer)
        session = self._segments.crossings[name]
        feeds = stream | positions | {"next_factor": FACTORS[plans[following.layer].lag]}
        x, p, qk, v = session.run(CROSSING_OUTPUTS, feeds)
        return {"x": x, "p": p}, (qk, v)

    def _store(
        self, plane: Plane, batch: Batch, stream: Arrays, plans: Sequence[LayerPlan]
    ) -> None:
        """Keep the stream that a layer reads, from which other anchors' keys are translated."""
        if plane.layer:
            x = stream["x"] if plans[plane.layer].lag else stream["x"] + stream["p"]
            self.model.boundaries.store(plane, batch, torch.from_numpy(x[0]))

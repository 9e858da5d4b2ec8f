"""Routes through several anchors in ONNX Runtime, in the segments of `segments.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import onnxruntime
import torch
from torch import Tensor

from ladderstitch.runtime.sessions import open_rank_session
from ladderstitch.text.comm.base import Communicator
from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.family import MapName, Plane, Route
from ladderstitch.text.model.onnx_attention import Array
from ladderstitch.text.model.residual import AffineMap, LayerPlan
from ladderstitch.text.model.segments import (
    FACTORS,
    Arrays,
    Projected,
    SegmentedTransformer,
    crossing_segment,
)
from ladderstitch.text.model.stitched import StitchedModel, StitchedPath
from ladderstitch.text.model.weights import RankWeights

CROSSING_OUTPUTS = ("next_x", "next_p", "qk", "v")


class FamilySegments:
    """The sessions of all anchors and stitching layers of a family on one rank of a CPU."""

    def __init__(
        self,
        anchors: Sequence[SegmentedTransformer],
        weights: Sequence[RankWeights],
        maps: Mapping[MapName, AffineMap],
        threads: int,
    ) -> None:
        """Open the sessions of the stitching layers; all anchors must keep lagged streams."""
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


class SegmentedPath(StitchedPath):
    """A `StitchedPath` whose forward pass runs in segments; torch translates the cache."""

    def __init__(self, model: StitchedModel, route: Route, segments: FamilySegments) -> None:
        super().__init__(model, route)
        self._segments, self._planes = segments, model.family.planes(self.route)

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
        session = self._segments.crossings[MapName(plane.anchor, following.anchor, following.layer)]
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

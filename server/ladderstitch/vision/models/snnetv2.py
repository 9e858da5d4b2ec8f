"""SN-Netv2 (arXiv 2307.00154): two vision transformers, stitched both ways, up to twice on a path.

With S blocks in the small anchor, L = r S in the large one, and lists of stitching layers 0 (small
to large) and 1 (large to small), ids count: the anchors; SL small 0..i, then large (i + 1) r..; LS
large 0..i for i = r - 1, 2 r - 1, ..., then small i // r + 1..; LSL every LS (a, b) followed by
every SL (c, d) with c >= b; SLS every SL (a, b) followed by every LS (c, d) with c >= b. The whole
small anchor followed by nothing of the large one has a number but is never trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ladderstitch.vision.models.route import Segment, Stitch
from ladderstitch.vision.models.stitched import StitchedModel, StitchingLayer
from ladderstitch.vision.models.vit import InputShape, Vit, VitConfig

Joint = tuple[int, int, str]
"""(last step before, first step after, stitching layer)."""


class SnNetV2Config(BaseModel):
    """Everything that determines an SN-Netv2 family but its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Literal["snnetv2"] = "snnetv2"
    inputs: InputShape
    anchors: tuple[VitConfig, VitConfig] = Field(description="small, large")

    @model_validator(mode="after")
    def _depths_divide(self) -> SnNetV2Config:
        small, large = self.anchors
        if large.depth % small.depth:
            raise ValueError(
                f"anchors: expected a large depth that is a multiple of {small.depth}, "
                f"got {large.depth}"
            )
        return self

    def stitches(self) -> tuple[Stitch, ...]:
        """Every network, `id` = position."""
        return tuple(
            Stitch(number, segments, layers, final_norm=True, usable=segments[-1].first <= last)
            for number, (segments, layers, last) in enumerate(self._routes())
        )

    def _routes(self) -> Iterator[tuple[tuple[Segment, ...], tuple[str, ...], int]]:
        """Segments, stitching layers between them, and the last step of the last anchor."""
        lasts = [anchor.depth - 1 for anchor in self.anchors]
        for anchor, last in enumerate(lasts):
            yield (Segment(anchor, 0, last),), (), last
        up, down = self._joints()
        for first, joints in ((0, up), (1, down)):
            for before, after, layer in joints:
                end = Segment(1 - first, after, lasts[1 - first])
                yield (Segment(first, 0, before), end), (layer,), lasts[1 - first]
        whole = self.anchors[0].depth - 1
        for first, out, back in ((1, down, up), (0, up, down)):
            for a, b, there in out:
                for c, d, home in back:
                    if c < b or (first == 1 and c == whole):
                        continue
                    segments = (
                        Segment(first, 0, a),
                        Segment(1 - first, b, c),
                        Segment(first, d, lasts[first]),
                    )
                    yield segments, (there, home), lasts[first]

    def _joints(self) -> tuple[list[Joint], list[Joint]]:
        """Small to large, and large to small."""
        small, large = (anchor.depth for anchor in self.anchors)
        ratio = large // small
        up = [(i, (i + 1) * ratio, f"stitch_layers.0.{i}.transform") for i in range(small)]
        down = [
            (i, i // ratio + 1, f"stitch_layers.1.{i // ratio}.transform")
            for i in range(ratio - 1, large - 1, ratio)
        ]
        return up, down

    def build(self) -> StitchedModel:
        """The model with torch's default initialisation, on torch's default device."""
        small, large = (anchor.embed_dim for anchor in self.anchors)
        up, down = self._joints()
        return StitchedModel(
            [Vit(self.inputs, anchor) for anchor in self.anchors],
            [
                [StitchingLayer(small, large) for _ in up],
                [StitchingLayer(large, small) for _ in down],
            ],
            self.stitches(),
        )

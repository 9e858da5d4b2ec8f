"""SN-Net families of hierarchical networks: Swin, ResNet, LeViT, EfficientNet-Lite, and mixtures.

Anchors are stitched inside a stage only, and never in the last one (arXiv 2302.06586, section 3.3).
If both stages have depth d, the pairs (last front block, first end block) are (j, j + 1) for
j = 0 .. d - 2, each with a layer of its own. If the depths are d1 < d2, with m(i) = floor(i d1 /
d2), the pairs are (m(i), i) for all i with m(i) < i. The n-th pair uses layer m(n), not m(i),
because the published checkpoints were trained so. Families that are not trained jointly may be
stitched at stage boundaries instead: all blocks of a stage, then the end anchor's next stage.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from ladderstitch.vision.models.efficientnet import EfficientNetLiteConfig
from ladderstitch.vision.models.grouped_path import GroupedPath
from ladderstitch.vision.models.levit import LevitConfig
from ladderstitch.vision.models.resnet import ResNetConfig
from ladderstitch.vision.models.route import Segment, Stitch
from ladderstitch.vision.models.stitched import (
    Layers,
    MapStitchingLayer,
    StitchedModel,
    StitchingLayer,
)
from ladderstitch.vision.models.swin import SwinConfig
from ladderstitch.vision.models.vit import InputShape

Hierarchical = SwinConfig | ResNetConfig | LevitConfig | EfficientNetLiteConfig
AnchorConfig = Annotated[Hierarchical, Field(discriminator="kind")]


class StagedConfig(BaseModel):
    """Configuration of a hierarchical SN-Net family."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Literal["snnet-staged"] = "snnet-staged"
    inputs: InputShape
    anchors: tuple[AnchorConfig, ...] = Field(min_length=1, description="smallest first")
    stages: tuple[int, ...] = Field(description="stages with stitches, from 0")
    joints: Literal["within", "after"] = Field(
        "within", description="stitch within a stage (SN-Net), or after the whole stage"
    )
    stitched_pairs: tuple[int, ...] | None = Field(
        None,
        description="positions of the anchors that are stitched to the next one; unset: all but "
        "the last. Anchors of nearly equal quality gain nothing from stitches between them",
    )
    grouped_paths: tuple[GroupedPath, ...] = Field(
        (), description="anchors some of whose blocks read one input; further networks"
    )

    @model_validator(mode="after")
    def _check_stages(self) -> StagedConfig:
        """Raise `ValueError` unless the stages exist and every front anchor is the smaller one."""
        shortest = min(len(anchor.depths) for anchor in self.anchors)
        if any(not 0 <= stage < shortest - 1 for stage in self.stages):
            raise ValueError(
                f"stages: expected stages 0 to {shortest - 2} (never the last), got {self.stages}"
            )
        for pair in self.stitched_pairs or ():
            if not 0 <= pair < len(self.anchors) - 1:
                raise ValueError(
                    f"stitched_pairs: expected 0 to {len(self.anchors) - 2}, got {pair}"
                )
        for front, end in self.pairs:
            if (front.layout, end.layout) == ("tokens", "map"):
                raise ValueError(
                    f"anchors: expected token layout after a {front.kind} (tokens), "
                    f"got a {end.kind} (maps)"
                )
            for stage in self.stages:
                if front.depths[stage] > end.depths[stage]:
                    raise ValueError(
                        f"anchors: expected the smaller one first, got {front.depths[stage]} "
                        f"before {end.depths[stage]} blocks in stage {stage}"
                    )
        return self

    @model_validator(mode="after")
    def _check_grouped_paths(self) -> StagedConfig:
        """Raise `ValueError` unless the paths fit their anchors and every network has its name."""
        for path in self.grouped_paths:
            path.segment(self.anchors)
        names = [stitch.name for stitch in self.stitches()]
        for path in self.grouped_paths:
            if names.count(path.name) > 1:
                raise ValueError(
                    f"grouped_paths: expected names that no other network has, got {path.name!r}"
                )
        return self

    @property
    def pairs(self) -> list[tuple[Hierarchical, ...]]:
        """Pairs of neighbouring anchors, (front, end)."""
        return list(zip(self.anchors, self.anchors[1:], strict=False))

    def stitches(self) -> tuple[Stitch, ...]:
        """Return every network: the anchors, stage by stage the pairs, then the grouped paths.

        A network's id is its position.
        """
        stitches = [
            Stitch(a, (Segment(a, 0, anchor.total_steps - 1),), (), True)
            for a, anchor in enumerate(self.anchors)
        ]
        for list_index, stage in enumerate(self.stages):
            for pair, (front, end) in enumerate(self.pairs):
                if not self._is_stitched(pair):
                    continue
                for leaving, entering, layer in self._list_joints(front, end, stage):
                    segments = (
                        Segment(pair, 0, leaving),
                        Segment(pair + 1, entering, end.total_steps - 1),
                    )
                    key = f"stitch_layers.{list_index}.{pair}.{layer}.transform"
                    stitches.append(Stitch(len(stitches), segments, (key,), True))
        for path in self.grouped_paths:
            route = (path.segment(self.anchors),)
            stitches.append(Stitch(len(stitches), route, (), True, given_name=path.name))
        return tuple(stitches)

    def _list_joints(
        self, front: Hierarchical, end: Hierarchical, stage: int
    ) -> list[tuple[int, int, int]]:
        """Return (last step of the front, first step of the end, stitching layer) per stitch."""
        if self.joints == "after":
            leaving = front.span(stage, front.depths[stage] - 1)[1]
            return [(leaving, end.span(stage, end.depths[stage] - 1)[1] + 1, 0)]
        return [
            (front.span(stage, last)[1], end.span(stage, first)[0], layer)
            for last, first, layer in stage_stitches(front.depths[stage], end.depths[stage])
        ]

    def build(self) -> StitchedModel:
        """Return the model with torch's default initialisation, on torch's default device."""
        layers: list[Layers] = [
            [
                [
                    _make_layer(front, end, stage)
                    for _ in range(self._count_layers(front, end, stage))
                    if self._is_stitched(pair)
                ]
                for pair, (front, end) in enumerate(self.pairs)
            ]
            for stage in self.stages
        ]
        return StitchedModel(
            [anchor.build(self.inputs) for anchor in self.anchors], layers, self.stitches()
        )

    def _is_stitched(self, pair: int) -> bool:
        return self.stitched_pairs is None or pair in self.stitched_pairs

    def _count_layers(self, front: Hierarchical, end: Hierarchical, stage: int) -> int:
        """Return the number of stitching layers between two anchors in a stage."""
        if self.joints == "after":
            return 1
        return layer_count(front.depths[stage], end.depths[stage])


def stage_stitches(front_depth: int, end_depth: int) -> list[tuple[int, int, int]]:
    """Return (last front block, first end block, stitching layer) within a stage, in id order."""
    if front_depth == end_depth:
        return [(block, block + 1, block) for block in range(front_depth - 1)]
    mapped = [i * front_depth // end_depth for i in range(end_depth)]
    joints = sorted((front, end) for end, front in enumerate(mapped) if front < end)
    return [(front, end, mapped[n]) for n, (front, end) in enumerate(joints)]


def layer_count(front_depth: int, end_depth: int) -> int:
    """Return the number of stitching layers in a stage's checkpoint, including unused ones."""
    return front_depth - 1 if front_depth == end_depth else front_depth


def _make_layer(front: Hierarchical, end: Hierarchical, stage: int) -> nn.Module:
    """Return a stitching layer from the front anchor's to the end anchor's width in a stage."""
    widths = front.widths[stage], end.widths[stage]
    if front.layout == "map":
        return MapStitchingLayer(*widths, to_tokens=end.layout == "tokens")
    return StitchingLayer(*widths)

"""SN-Net and SN-Netv2 families of vision transformers: configurations, stitches and models.

SN-Net pairs anchors of one depth (arXiv 2302.06586, section 3.3): a window of `kernel_size` blocks
slides by `stride` over the depth. In each window, every new ordered pair (j, k) becomes a stitch
"front blocks 0..j, then end blocks k..". All pairs that are new in one window share that window's
stitching layer. A window without a new pair gets no layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from ladderstitch.vision.models.route import Segment, Stitch
from ladderstitch.vision.models.stitched import StitchedModel, StitchingLayer
from ladderstitch.vision.models.vit import InputShape, Vit, VitConfig


class SnNetConfig(BaseModel):
    """Configuration of an SN-Net family of vision transformers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Literal["snnet"] = "snnet"
    inputs: InputShape
    anchors: tuple[VitConfig, ...] = Field(min_length=1, description="smallest first")
    kernel_size: int = Field(2, gt=0, description="blocks in a stitching window")
    stride: int = Field(1, gt=0, description="blocks from one window to the next")
    nearest_only: bool = Field(True, description="stitch neighbouring anchors only")
    final_norm_on_anchors: bool = True
    final_norm_on_stitches: bool = Field(
        False, description="final norm on stitches; the published DeiT checkpoints skip it"
    )
    identity_between_equals: bool = Field(
        False, description="no stitching layer between anchors of equal width (Learngene Pool)"
    )
    trained_pairs: tuple[tuple[int, int], ...] | None = Field(
        None, description="anchor pairs that are usable, with their stitches; unset: all pairs"
    )

    @model_validator(mode="after")
    def _check_depths(self) -> SnNetConfig:
        """Raise `ValueError` unless all anchors have the same depth."""
        depths = [anchor.depth for anchor in self.anchors]
        if len(set(depths)) > 1:
            raise ValueError(f"anchors: expected anchors of one depth, got {depths}")
        return self

    @property
    def depth(self) -> int:
        """Number of blocks of every anchor."""
        return self.anchors[0].depth

    def stitches(self) -> tuple[Stitch, ...]:
        """Return every network of the family; a network's id is its position."""
        stitches = enumerate_stitches(
            anchors=len(self.anchors),
            depth=self.depth,
            kernel_size=self.kernel_size,
            stride=self.stride,
            nearest_only=self.nearest_only,
            final_norm_on_anchors=self.final_norm_on_anchors,
            final_norm_on_stitches=self.final_norm_on_stitches,
        )
        return tuple(
            replace(stitch, layers=self._layer_keys(stitch), usable=self._is_usable(stitch))
            for stitch in stitches
        )

    def _layer_keys(self, stitch: Stitch) -> tuple[str | None, ...]:
        """Return the keys of the stitch's layers, with None for an identity."""
        if self._is_identity(stitch.front, stitch.end):
            return (None,) * len(stitch.layers)
        return stitch.layers

    def _is_identity(self, front: int, end: int) -> bool:
        """Return whether the two anchors are joined without a stitching layer."""
        same = self.anchors[front].embed_dim == self.anchors[end].embed_dim
        return self.identity_between_equals and same

    def _is_usable(self, stitch: Stitch) -> bool:
        """Return whether the stitch belongs to a trained pair of anchors."""
        if self.trained_pairs is None:
            return True
        if stitch.is_anchor:
            return any(stitch.front in pair for pair in self.trained_pairs)
        return (stitch.front, stitch.end) in self.trained_pairs

    def build(self) -> StitchedModel:
        """Return the model with torch's default initialisation, on torch's default device."""
        layers_per_pair = len(paired_windows(self.depth, self.kernel_size, self.stride))
        pairs = anchor_pairs(len(self.anchors), nearest_only=self.nearest_only)
        return StitchedModel(
            anchors=[Vit(self.inputs, anchor) for anchor in self.anchors],
            stitch_layers=[
                [
                    nn.Identity()
                    if self._is_identity(front, end)
                    else StitchingLayer(self.anchors[front].embed_dim, self.anchors[end].embed_dim)
                    for _ in range(layers_per_pair)
                ]
                for front, end in pairs
            ],
            stitches=self.stitches(),
        )


def paired_windows(depth: int, kernel_size: int, stride: int) -> list[list[tuple[int, int]]]:
    """Return pairs (last front block, first end block) per stitching layer, in id order.

    `paired_windows(12, 2, 1)` has 11 layers and 34 pairs, as in the published DeiT family. Raises
    `ValueError` for an argument below 1.
    """
    for field, value in (("depth", depth), ("kernel_size", kernel_size), ("stride", stride)):
        if value < 1:
            raise ValueError(f"{field}: expected at least 1, got {value}")
    seen: set[tuple[int, int]] = set()
    windows: list[list[tuple[int, int]]] = []
    for start in range(0, depth, stride):
        window = range(start, min(start + kernel_size, depth))
        new = [(j, k) for j in window for k in window if (j, k) not in seen]
        if new:
            seen.update(new)
            windows.append(new)
    return windows


def anchor_pairs(anchors: int, *, nearest_only: bool) -> list[tuple[int, int]]:
    """Return (front, end) anchor pairs, smaller to larger; only neighbours if `nearest_only`."""
    return [
        (front, end)
        for front in range(anchors)
        for end in range(front + 1, anchors)
        if end == front + 1 or not nearest_only
    ]


def enumerate_stitches(
    *,
    anchors: int,
    depth: int,
    kernel_size: int,
    stride: int,
    nearest_only: bool = True,
    final_norm_on_anchors: bool = True,
    final_norm_on_stitches: bool = False,
) -> tuple[Stitch, ...]:
    """Return all stitches of a family of equal depths: the anchors first, then pair by pair.

    A stitch's id is its position. There are two final-norm flags because the published DeiT
    checkpoints skip the final norm on stitches but not on anchors.
    """
    stitches = [
        Stitch(a, (Segment(a, 0, depth - 1),), (), final_norm_on_anchors) for a in range(anchors)
    ]
    windows = paired_windows(depth, kernel_size, stride)
    for pair, (front, end) in enumerate(anchor_pairs(anchors, nearest_only=nearest_only)):
        for layer, window in enumerate(windows):
            for last_front, first_end in window:
                stitches.append(
                    Stitch(
                        id=len(stitches),
                        segments=(
                            Segment(front, 0, last_front),
                            Segment(end, first_end, depth - 1),
                        ),
                        layers=(f"stitch_layers.{pair}.{layer}.transform",),
                        final_norm=final_norm_on_stitches,
                    )
                )
    return tuple(stitches)


Joint = tuple[int, int, str]
"""(last step before the stitching layer, first step after it, its state-dict key)."""


class SnNetV2Config(BaseModel):
    """Configuration of an SN-Netv2 family, whose stitches run from small to large and back."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Literal["snnetv2"] = "snnetv2"
    inputs: InputShape
    anchors: tuple[VitConfig, VitConfig] = Field(description="the small one, the large one")

    @model_validator(mode="after")
    def _check_depths(self) -> SnNetV2Config:
        """Raise `ValueError` unless the large depth is a multiple of the small one."""
        small, large = self.anchors
        if large.depth % small.depth:
            raise ValueError(
                f"anchors: expected a large depth that is a multiple of {small.depth}, "
                f"got {large.depth}"
            )
        return self

    def stitches(self) -> tuple[Stitch, ...]:
        """Return every network of the family; a network's id is its position."""
        return tuple(
            Stitch(number, segments, layers, final_norm=True, usable=segments[-1].first <= last)
            for number, (segments, layers, last) in enumerate(self._enumerate_routes())
        )

    def _enumerate_routes(self) -> Iterator[tuple[tuple[Segment, ...], tuple[str, ...], int]]:
        """Yield the segments, the stitching layers, and the last step of the last anchor."""
        lasts = [anchor.depth - 1 for anchor in self.anchors]
        for anchor, last in enumerate(lasts):
            yield (Segment(anchor, 0, last),), (), last
        up, down = self._list_joints()
        for first, joints in ((0, up), (1, down)):
            for before, after, layer in joints:
                end = Segment(1 - first, after, lasts[1 - first])
                yield (Segment(first, 0, before), end), (layer,), lasts[1 - first]
        small_last = self.anchors[0].depth - 1
        for first, outward, back in ((1, down, up), (0, up, down)):
            for a, b, outward_layer in outward:
                for c, d, back_layer in back:
                    if c < b or (first == 1 and c == small_last):
                        continue
                    segments = (
                        Segment(first, 0, a),
                        Segment(1 - first, b, c),
                        Segment(first, d, lasts[first]),
                    )
                    yield segments, (outward_layer, back_layer), lasts[first]

    def _list_joints(self) -> tuple[list[Joint], list[Joint]]:
        """Return the joints from small to large, and those from large to small."""
        small, large = (anchor.depth for anchor in self.anchors)
        ratio = large // small
        up = [(i, (i + 1) * ratio, f"stitch_layers.0.{i}.transform") for i in range(small)]
        down = [
            (i, i // ratio + 1, f"stitch_layers.1.{i // ratio}.transform")
            for i in range(ratio - 1, large - 1, ratio)
        ]
        return up, down

    def build(self) -> StitchedModel:
        """Return the model with torch's default initialisation, on torch's default device."""
        small, large = (anchor.embed_dim for anchor in self.anchors)
        up, down = self._list_joints()
        return StitchedModel(
            [Vit(self.inputs, anchor) for anchor in self.anchors],
            [
                [StitchingLayer(small, large) for _ in up],
                [StitchingLayer(large, small) for _ in down],
            ],
            self.stitches(),
        )

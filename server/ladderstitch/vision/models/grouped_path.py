"""Paths of a family that run blocks of one anchor in groups, as data in `model.yaml`."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from ladderstitch.vision.models.route import Group, Segment
from ladderstitch.vision.models.stitched import ConvConfig

Groups = tuple[tuple[StrictInt, StrictInt], ...]
"""Groups of adjacent blocks of a stage, each as its first block (from 0) and its size."""


class GroupedPath(BaseModel):
    """An anchor some of whose blocks read one input, with the anchor's own weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._+-]{0,62}$")
    anchor: StrictInt = Field(ge=0, description="position of the anchor in the family")
    groups: tuple[Groups, ...] = Field(
        description="for each stage of the anchor, [first block, number of blocks] of each group; "
        "other blocks run one by one"
    )

    def segment(self, anchors: Sequence[object]) -> Segment:
        """Return the route through the anchor.

        Raises `ValueError` that names the field if the path does not fit the anchors: groups are
        blocks of one stage whose outputs have the shape of their input, each in one group only.
        """
        if self.anchor >= len(anchors):
            raise ValueError(
                f"{self._field('anchor')}: expected 0 to {len(anchors) - 1}, got {self.anchor}"
            )
        shape = anchors[self.anchor]
        if not isinstance(shape, ConvConfig):
            kind = getattr(shape, "kind", "vit")
            raise ValueError(
                f"{self._field('anchor')}: expected a resnet or an efficientnet-lite, got a {kind}"
            )
        if len(self.groups) != len(shape.depths):
            raise ValueError(
                f"{self._field('groups')}: expected {len(shape.depths)} lists, one per stage, got "
                f"{len(self.groups)}"
            )
        steps = [
            group for stage in range(len(shape.depths)) for group in self._stage_steps(stage, shape)
        ]
        if not steps:
            raise ValueError(f"{self._field('groups')}: expected at least one group, got none")
        return Segment(self.anchor, 0, shape.total_steps - 1, tuple(steps))

    def _stage_steps(self, stage: int, shape: ConvConfig) -> list[Group]:
        """Return the groups of a stage, in steps of the anchor."""
        free = shape.first_residual(stage)  # the first block that is in no group yet
        steps = []
        for first, size in sorted(self.groups[stage]):
            if first < free or size < 1 or first + size > shape.depths[stage]:
                start, last = shape.first_residual(stage), shape.depths[stage] - 1
                reason = ", because block 0 changes the shape" if start else ""
                blocks = f"of blocks {start} to {last}" if last >= start else "of no block"
                raise ValueError(
                    f"{self._field('groups')}: expected groups of at least 1 {blocks} in stage "
                    f"{stage} that do not overlap{reason}, got {[first, size]}"
                )
            steps.append((shape.span(stage, first)[0], size))
            free = first + size
        return steps

    def _field(self, name: str) -> str:
        return f"grouped_paths.{self.name}.{name}"

"""What convolutional anchors share: stages of blocks over maps, which downsample as they begin."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class MapAnchorConfig(BaseModel):
    """Shape of an anchor whose steps are its blocks, on maps [B, D, H, W]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    depths: tuple[int, ...]

    @property
    def layout(self) -> Literal["map"]:
        return "map"

    @property
    def total_steps(self) -> int:
        return sum(self.depths)

    def span(self, stage: int, block: int) -> tuple[int, int]:
        """First and last step of a stage's block."""
        step = sum(self.depths[:stage]) + block
        return step, step

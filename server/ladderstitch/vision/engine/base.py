"""The seam to whatever computes: one batch in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ladderstitch.scheduling.requests import Logits, Pixels


class EngineDied(Exception):
    """The engine lost its worker in the middle of a batch; the batch may be run again."""


@dataclass(frozen=True, slots=True)
class EngineResult:
    """Logits of all rows in order, and seconds of compute."""

    logits: Logits
    compute_s: float


class Engine(Protocol):
    """Runs one batch at a time; the scheduler never overlaps calls."""

    async def forward(self, images: Sequence[Pixels], stitch: int) -> EngineResult:
        """`images` holds each request's [n, C, H, W].

        Raises `EngineDied` if the worker is lost and `InternalError` if this batch failed in it.
        """
        ...

"""The serving nouns: a request, its budget, the completion that answers it.

All times are seconds on the clock of `time.monotonic`; `inf` stands for "no such deadline".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float32]
"""[N, C, H, W], preprocessed, contiguous."""

Logits = NDArray[np.float32]
"""[N, classes]."""


@dataclass(frozen=True, slots=True)
class Budget:
    """When an answer is wanted and when it becomes useless, and who said so.

    `target` is the earliest of all deadlines named: what policies plan for. `limit` is the earliest
    of the hard ones: no work starts, or goes on, past it.
    """

    target: float = float("inf")
    limit: float = float("inf")
    target_source: str = "none"
    limit_source: str = "none"


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One accepted call for `images.shape[0]` answers from one stitch."""

    id: str
    images: Pixels
    arrival: float
    budget: Budget
    min_quality: float = 0.0
    stitch: int | None = None
    priority: int = 0

    @property
    def rows(self) -> int:
        return int(self.images.shape[0])


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one request, and what it cost; the answer's rows are the request's."""

    logits: Logits
    stitch: int
    quality: float
    queue_s: float
    compute_s: float
    batch_rows: int

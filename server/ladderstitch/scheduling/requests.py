"""The serving nouns: requests, their deadlines, and the answers to images.

All times are seconds on the clock of `time.monotonic`; `inf` means that there is no such deadline.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ladderstitch.errors import InvalidArgument

Pixels = NDArray[np.float32]
"""[B, C, H, W]: B preprocessed images, or other inputs [B, ...], in contiguous memory."""

Logits = NDArray[np.float32]
"""[B, K]: K class scores for each of B images; of other models, all outputs of an image in a row.
"""

Mask = NDArray[np.bool_]

MAX_ID_CHARACTERS = 128
"""Largest number of characters of the id that a caller gives a request."""
MAX_PRIORITY = 255


@dataclass(frozen=True, slots=True)
class Deadlines:
    """The instants by which an answer is due, and the caller's fields that set them.

    `soft` is the earliest of all deadlines, and policies plan for it. `hard` is the earliest of the
    hard deadlines: no work starts or continues after it.
    """

    soft: float = float("inf")
    hard: float = float("inf")
    soft_source: str = "none"
    hard_source: str = "none"


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One call for images [B, C, H, W] that one variant answers together."""

    id: str
    images: Pixels
    arrival: float
    deadlines: Deadlines
    min_quality: float = 0.0
    variant: int | None = None
    priority: int = 0
    """0 for unset, 1 (highest) to 255 (lowest)."""
    min_confidence: float = 0.0
    """Calibrated probability of the first class from which a cheap variant suffices; 0: none."""
    is_finite: bool = True
    """Whether all numbers are finite; with others, outputs that are not finite are an answer."""
    num_images: int = field(init=False)
    """The number of images, B: a field, because a decision reads it dozens of times."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_images", int(self.images.shape[0]))


def check_id(field: str, value: str) -> None:
    """Raise `InvalidArgument`, which names `field`, if a caller's request id is too long."""
    if len(value) > MAX_ID_CHARACTERS:
        raise InvalidArgument(
            field, f"expected at most {MAX_ID_CHARACTERS} characters, got {len(value)}"
        )


def check_quality(min_quality: float) -> None:
    """Raise `InvalidArgument` if a minimum quality is not in [0, 1]."""
    if not 0 <= min_quality <= 1:  # NaN fails too
        raise InvalidArgument("min_quality", f"expected 0 to 1, got {min_quality}")


def check_confidence(min_confidence: float) -> None:
    """Raise `InvalidArgument` if a minimum confidence is not in [0, 1]."""
    if not 0 <= min_confidence <= 1:  # NaN fails too
        raise InvalidArgument("min_confidence", f"expected 0 to 1, got {min_confidence}")


def check_priority(priority: int) -> None:
    """Raise `InvalidArgument` if a priority is neither 0, for unset, nor 1 to 255."""
    if not 0 <= priority <= MAX_PRIORITY:
        raise InvalidArgument("priority", f"expected 0 to {MAX_PRIORITY}, got {priority}")


StageEnd = Literal["sure", "complete", "time"]
"""Why the stages of a cascade ended: the first one is sure, the last one has run, or no time was
left for it."""


@dataclass(frozen=True, slots=True)
class Certainty:
    """How sure an answer is: the confidence of each of B images, and the variant of its logits.

    `stages` are the variants that ran for the request, in order.
    """

    stages: tuple[int, ...]
    confidence: tuple[float, ...]
    variants: tuple[int, ...]
    end: StageEnd = "complete"


@dataclass(frozen=True, slots=True)
class ImageAnswer:
    """The answer to one request: logits [B, K] of its B images, and the seconds that it took.

    `batch_size` counts the images of the whole batch that the request ran in. `variant` is the last
    one that ran for it, and `certainty` is set if the request has `min_confidence`.
    """

    logits: Logits
    variant: int
    quality: float
    queue_s: float
    compute_s: float
    batch_size: int
    certainty: Certainty | None = None

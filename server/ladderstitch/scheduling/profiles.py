"""What was measured of a family: quality and latency per variant, and the frontier of the two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Quality(BaseModel):
    """Score of one variant in [0, 1] with its confidence interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)
    perplexity: float | None = Field(None, ge=1, description="of language models, on the same text")


class QualityTable(BaseModel):
    """`quality.json`: what quality means for this bundle, and every variant's score."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    data: str
    n: int = Field(gt=0, description="examples that each score was measured on")
    confidence: float = Field(gt=0, lt=1)
    date: str
    versions: dict[str, str]
    variants: dict[int, Quality] = Field(min_length=1)

    def value(self, variant: int) -> float:
        return self.variants[variant].value


class Latency(BaseModel):
    """Seconds of one variant by batch size, in the profile's order of `batch_sizes`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    median_s: tuple[float, ...]
    p99_s: tuple[float, ...]


class LatencyProfile(BaseModel):
    """`latency.json`: seconds of compute per (variant, batch size) on a stated device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    threads: int = Field(gt=0)
    date: str
    versions: dict[str, str]
    batch_sizes: tuple[int, ...] = Field(min_length=1)
    variants: dict[int, Latency] = Field(min_length=1)

    @model_validator(mode="after")
    def _shapes_agree(self) -> LatencyProfile:
        if self.batch_sizes[0] != 1 or any(b <= a for a, b in pairwise(self.batch_sizes)):
            raise ValueError(f"batch_sizes: expected 1 < ... ascending, got {self.batch_sizes}")
        for variant, latency in self.variants.items():
            for field in ("median_s", "p99_s"):
                seconds = getattr(latency, field)
                if len(seconds) != len(self.batch_sizes) or min(seconds) <= 0:
                    raise ValueError(
                        f"variants.{variant}.{field}: expected {len(self.batch_sizes)} positive "
                        f"seconds, got {seconds}"
                    )
        return self

    @property
    def max_batch(self) -> int:
        return self.batch_sizes[-1]

    def alone_s(self, variant: int) -> float:
        """Median seconds at batch size 1."""
        return self.variants[variant].median_s[0]


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    variant: int
    quality: float
    latency_s: float


def frontier(quality: Mapping[int, float], latency_s: Mapping[int, float]) -> list[FrontierPoint]:
    """Variants that no other beats in both quality and latency, fastest first.

    Along the result both quality and latency rise strictly; of equals the lowest id stays.
    """
    points = sorted(
        (FrontierPoint(s, quality[s], latency_s[s]) for s in quality.keys() & latency_s.keys()),
        key=lambda p: (p.latency_s, -p.quality, p.variant),
    )
    best: list[FrontierPoint] = []
    for point in points:
        if not best or point.quality > best[-1].quality:
            best.append(point)
    return best

"""Measurements of a family: quality and latency of every variant, and their frontier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ladderstitch.scheduling.cascades import Cascade, CascadeSet


class Quality(BaseModel):
    """The score of one variant, 0 to 1, with its confidence interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)
    perplexity: float | None = Field(
        None, ge=1, description="perplexity on the same text; language models only"
    )
    temperature: float | None = Field(
        None, gt=0, description="divisor of logits for confidences; image models only"
    )
    calibration_error: float | None = Field(
        None, ge=0, le=1, description="expected calibration error of the confidences, 15 bins"
    )
    agreement: float | None = Field(
        None, ge=0, le=1, description="share of images with the class of the best variant"
    )

    @classmethod
    def mean(cls, parts: Sequence[tuple[Quality, int]]) -> Quality:
        """Return the mean of scores, each of which counts for a number of tokens.

        Perplexities are averaged as logarithms, like the tokens that they come from.
        """
        if len(parts) == 1:
            return parts[0][0]
        total = sum(count for _, count in parts)
        mean = {
            name: sum(getattr(quality, name) * count for quality, count in parts) / total
            for name in ("value", "low", "high")
        }
        logs = [(math.log(q.perplexity), n) for q, n in parts if q.perplexity is not None]
        complete = len(logs) == len(parts)
        perplexity = math.exp(sum(log * n for log, n in logs) / total) if complete else None
        return cls(**mean, perplexity=perplexity)


class QualityTable(BaseModel):
    """The contents of `quality.json`: the metric of a bundle and the score of every variant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    data: str
    n: int = Field(gt=0, description="number of examples behind each score")
    confidence: float = Field(gt=0, lt=1)
    date: str
    versions: dict[str, str]
    variants: dict[int, Quality] = Field(min_length=1)
    cascades: tuple[Cascade, ...] = ()

    @property
    def agreements(self) -> dict[int, float]:
        """The agreement with the best variant, of all variants whose agreement was measured."""
        measured = {variant: quality.agreement for variant, quality in self.variants.items()}
        return {variant: share for variant, share in measured.items() if share is not None}

    @property
    def cascade_set(self) -> CascadeSet:
        """The cascades, and the temperatures of all variants that have one."""
        temperatures = {
            variant: quality.temperature
            for variant, quality in self.variants.items()
            if quality.temperature is not None
        }
        return CascadeSet(temperatures, self.cascades)

    def value(self, variant: int) -> float:
        """Return the score of a variant, 0 to 1."""
        return self.variants[variant].value


class Latency(BaseModel):
    """The seconds of one variant, one value for each of the profile's `batch_sizes`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    median_s: tuple[float, ...]
    p99_s: tuple[float, ...]


class LatencyProfile(BaseModel):
    """The contents of `latency.json`: seconds of compute per variant and batch size on a device."""

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
    def max_batch_size(self) -> int:
        """The largest profiled batch size."""
        return self.batch_sizes[-1]

    def alone_s(self, variant: int) -> float:
        """Return the median seconds of a variant at batch size 1."""
        return self.variants[variant].median_s[0]


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """A variant on the frontier, with its quality and its latency in seconds."""

    variant: int
    quality: float
    latency_s: float


def frontier(quality: Mapping[int, float], latency_s: Mapping[int, float]) -> list[FrontierPoint]:
    """Return the variants that no other variant beats in both quality and latency, fastest first.

    Both quality and latency rise strictly along the result. Of equal variants the result has the
    one with the lowest id.
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

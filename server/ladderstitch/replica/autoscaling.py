"""How many replicas a load needs: quality is reduced before replicas are added. Pure functions.

A replica computes for some seconds per request, and for fewer seconds if it uses a faster variant.
Fewer replicas therefore mean faster variants, down to the quality goal. A replica is added only if
the load would push quality below the goal, or if requests are late. A replica is removed if the
others would keep the goal with some headroom.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

State = Literal["steady", "spending_quality", "adding_replicas", "removing_replicas"]


class ScalingGoals(BaseModel):
    """Configured goals of the autoscaler."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quality: float | None = Field(
        None,
        ge=0,
        le=1,
        description="mean quality that is kept by adding replicas; unset: half-way between the "
        "fastest and the best variant",
    )
    attainment: float = Field(0.97, gt=0, le=1, description="share of budgets to meet")
    utilization: float = Field(
        0.7, gt=0, le=1, description="share of its time that a replica may compute"
    )
    headroom: float = Field(
        0.25, ge=0, description="additional load, as a share, that must fit before one is removed"
    )


@dataclass(frozen=True, slots=True)
class VariantCost:
    """A variant of the frontier: seconds of compute per request, and its quality in [0, 1]."""

    seconds: float
    quality: float


@dataclass(frozen=True, slots=True)
class LoadSample:
    """The load of one replica since the previous sample."""

    demand_per_s: float
    """Requests per second, including rejected ones."""
    utilization: float
    """Share of the time that the replica computed."""
    attainment: float
    """Share of budgets that were met; 1 without any."""
    variants: tuple[VariantCost, ...]
    """Variants of the frontier, fastest first, so that quality rises."""

    def to_stats(self) -> dict[str, float]:
        """Return the sample as the flat numbers that Ray Serve carries."""
        stats = {
            "demand_per_s": self.demand_per_s,
            "utilization": self.utilization,
            "attainment": self.attainment,
        }
        for i, variant in enumerate(self.variants):
            stats[f"seconds.{i}"], stats[f"quality.{i}"] = variant.seconds, variant.quality
        return stats

    @classmethod
    def from_stats(cls, stats: Mapping[str, float]) -> LoadSample:
        """Return the sample that `to_stats` flattened; raises `KeyError` if a number is missing."""
        count = sum(name.startswith("seconds.") for name in stats)
        variants = tuple(
            VariantCost(stats[f"seconds.{i}"], stats[f"quality.{i}"]) for i in range(count)
        )
        return cls(stats["demand_per_s"], stats["utilization"], stats["attainment"], variants)


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """The number of replicas that the load needs, and the state of the deployment."""

    replicas: int
    state: State


def decide(loads: Sequence[LoadSample], replicas: int, goals: ScalingGoals) -> ScalingDecision:
    """Return the decision for `replicas` running replicas.

    `loads` may lack replicas that have just started. Without any load nothing changes.
    """
    if not loads or not loads[0].variants:
        return ScalingDecision(replicas, "steady")
    variants = loads[0].variants
    demand = sum(load.demand_per_s for load in loads)
    goal_s = seconds_at_quality(target_quality(variants, goals), variants)
    required = _replicas_for(demand, goal_s, goals)
    if required > replicas:
        return ScalingDecision(required, "adding_replicas")
    late = _attainment(loads) < goals.attainment
    busiest = max(load.utilization for load in loads)
    if late and busiest > goals.utilization / 2:  # an idle replica misses only impossible budgets
        return ScalingDecision(replicas + 1, "adding_replicas")
    enough = _replicas_for(demand * (1 + goals.headroom), goal_s, goals)
    if enough < replicas and not late:
        return ScalingDecision(enough, "removing_replicas")
    best = variants[-1]
    if demand * best.seconds / replicas > goals.utilization:
        return ScalingDecision(replicas, "spending_quality")
    return ScalingDecision(replicas, "steady")


def target_quality(variants: Sequence[VariantCost], goals: ScalingGoals) -> float:
    """Return the quality goal, bounded by the qualities of the fastest and the best variant."""
    lowest, highest = variants[0].quality, variants[-1].quality
    wanted = (lowest + highest) / 2 if goals.quality is None else goals.quality
    return min(max(wanted, lowest), highest)


def seconds_at_quality(quality: float, variants: Sequence[VariantCost]) -> float:
    """Return the seconds per request if variants are mixed to this mean quality."""
    for faster, better in itertools.pairwise(variants):
        if quality <= better.quality:
            share = (quality - faster.quality) / (better.quality - faster.quality)
            return faster.seconds + share * (better.seconds - faster.seconds)
    return variants[-1].seconds


def _replicas_for(demand_per_s: float, seconds: float, goals: ScalingGoals) -> int:
    return max(1, math.ceil(demand_per_s * seconds / goals.utilization))


def _attainment(loads: Sequence[LoadSample]) -> float:
    demand = sum(load.demand_per_s for load in loads)
    if demand == 0:
        return 1.0
    return sum(load.attainment * load.demand_per_s for load in loads) / demand

"""What the paths of all nested networks have in common: a name, checks and random choices."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

Choice = TypeVar("Choice")
SPREAD = 0.35
"""Half-width of a random choice around its level, as a share of the list of choices."""


class NestedPath(BaseModel):
    """One network of a nested family: the choice of an architecture, as data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = Field(
        None, pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="unset: `path-N`"
    )

    @property
    def image_size(self) -> int | None:
        """Side in pixels to which the path resizes its images; None: the family's."""
        return None


def require(field: str, values: Sequence[Choice], count: int, allowed: Collection[Choice]) -> None:
    """Raise `ValueError` unless there are `count` values, all of them among those allowed."""
    if len(values) != count:
        raise ValueError(f"paths.{field}: expected {count} values, got {len(values)}")
    if wrong := [value for value in values if value not in allowed]:
        raise ValueError(f"paths.{field}: expected values among {list(allowed)}, got {wrong[0]}")


def require_at_most(field: str, values: Sequence[int], limits: Sequence[int]) -> None:
    """Raise `ValueError` unless there is one value for each limit, from 1 to this limit."""
    if len(values) != len(limits):
        raise ValueError(f"{field}: expected {len(limits)} values, got {len(values)}")
    for number, (value, limit) in enumerate(zip(values, limits, strict=True)):
        if not 1 <= value <= limit:
            raise ValueError(f"{field}[{number}]: expected 1 to {limit}, got {value}")


def draw(rng: random.Random, choices: Sequence[Choice], level: float) -> Choice:
    """Return a random one of ascending choices near a level from 0 (the first) to 1 (the last).

    At level 0 it is always the first and at level 1 always the last. Independent uniform choices
    would give nearly all paths a medium cost.
    """
    noise = 0.0 if level in (0.0, 1.0) else rng.uniform(-SPREAD, SPREAD)
    position = round((level + noise) * (len(choices) - 1))
    return choices[min(max(position, 0), len(choices) - 1)]

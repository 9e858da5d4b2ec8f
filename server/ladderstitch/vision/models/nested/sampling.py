"""A finite list of paths out of the many that a supernet has."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

from ladderstitch.errors import ConfigError
from ladderstitch.vision.models.nested.model import Net

ATTEMPTS = 50
"""Draws for each listed path, after which a supernet is taken to have no more."""


def sample_paths(net: Net, count: int, seed: int) -> list[Mapping[str, Any]]:
    """Return the fields of the smallest, the largest and random paths, `count` different ones.

    Random paths are spread evenly from small to large. A supernet with fewer paths gives all that
    were drawn. Raises `ConfigError` for fewer than two.
    """
    if count < 2:
        raise ConfigError(f"paths: expected at least 2 (smallest and largest), got {count}")
    rng = random.Random(seed)
    drawn: dict[str, Mapping[str, Any]] = {}

    def add(name: str | None, level: float) -> bool:
        fields = net.sample(rng, level)
        key = json.dumps(fields)
        if key in drawn:
            return False
        drawn[key] = fields if name is None else {"name": name, **fields}
        return True

    add("smallest", 0.0)
    for number in range(1, count - 1):
        level = number / (count - 1)
        any(add(None, min(max(level, 0.001), 0.999)) for _ in range(ATTEMPTS))
    add("largest", 1.0)
    return list(drawn.values())

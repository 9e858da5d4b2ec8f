"""A finite list of paths out of the many that a supernet has."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any, get_args

from ladderstitch.errors import ConfigError
from ladderstitch.vision.models.nested.model import NestedConfig, Net

ATTEMPTS = 50
"""Draws for each listed path, after which a supernet is taken to have no more."""


def sample_paths(net: Net, count: int, seed: int) -> list[Mapping[str, Any]]:
    """Return the fields of the smallest, the largest and random paths, `count` different ones.

    Random paths are spread from small to large. A supernet with fewer paths gives those that were
    drawn. Raises `ConfigError` for fewer than two.
    """
    if count < 2:
        raise ConfigError(f"paths: expected at least 2 (smallest and largest), got {count}")
    rng = random.Random(seed)
    drawn: dict[str, Mapping[str, Any]] = {}
    largest = json.dumps(net.sample(random.Random(seed), 1.0))

    def add(name: str | None, level: float) -> bool:
        fields = net.sample(rng, level)
        key = json.dumps(fields)
        if key in drawn or (key == largest and name is None):
            return False
        drawn[key] = fields if name is None else {"name": name, **fields}
        return True

    add("smallest", 0.0)
    for number in range(1, count - 1):
        level = number / (count - 1)
        any(add(None, min(max(level, 0.001), 0.999)) for _ in range(ATTEMPTS))
    for _ in range(ATTEMPTS * count):  # what is missing where there are few choices
        if len(drawn) >= count - 1:
            break
        add(None, rng.uniform(0.001, 0.999))
    add("largest", 1.0)
    return list(drawn.values())


def sampled_config(fields: Mapping[str, Any], count: int, seed: int) -> NestedConfig:
    """Return the family of these fields, whose supernet has no paths yet, with sampled ones.

    Raises `ConfigError` for a count below two, `ValidationError` for fields that do not fit.
    """
    net = dict(fields["net"])
    kinds = {kind.model_fields["kind"].default: kind for kind in get_args(get_args(Net)[0])}
    kind = kinds.get(net.get("kind"))
    if kind is None:
        raise ConfigError(f"net.kind: expected one of {sorted(kinds)}, got {net.get('kind')!r}")
    net["paths"] = sample_paths(kind.model_construct(**net), count, seed)
    return NestedConfig.model_validate({**fields, "net": net})

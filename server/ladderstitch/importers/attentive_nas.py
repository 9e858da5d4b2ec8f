"""The configuration files of AttentiveNAS and AlphaNet: search space, published networks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ladderstitch.errors import ConfigError

Fields = dict[str, Any]
IMAGE_SIZE = 224
"""Side to which upstream prepares every image before a network resizes it."""
STAGE = re.compile(r"mb[1-9][0-9]?")
PATH_FIELDS = ("resolution", "width", "kernel_size", "expand_ratio", "depth")


def read_search_space(config: Mapping[str, Any]) -> Fields:
    """Return the fields of our supernet from `supernet_config`; without it, the published ones.

    Raises `ConfigError` for what this layout does not have, `KeyError` for a field that is missing.
    """
    if "supernet_config" not in config:
        return {}
    space = _mapping(config["supernet_config"], "supernet_config")
    if (groups := space.get("channels_per_group", 1)) != 1:
        raise ConfigError(f"config.supernet_config.channels_per_group: expected 1, got {groups}")
    names = sorted((name for name in space if STAGE.fullmatch(name)), key=lambda n: int(n[2:]))
    if names != [f"mb{number}" for number in range(1, len(names) + 1)]:
        raise ConfigError(f"config.supernet_config: expected mb1, mb2 and so on, got {names}")
    parts = {
        name: _mapping(space[name], f"supernet_config.{name}")
        for name in ("first_conv", *names, "last_conv")
    }
    for name, part in parts.items():
        _expect(part, name, "act_func", "swish")
    _expect(parts["first_conv"], "first_conv", "s", 2)
    stages = [parts[name] for name in names]
    return {
        "resolution_list": space["resolutions"],
        "width_list": [part["c"] for part in parts.values()],
        "depth_list": [stage["d"] for stage in stages],
        "ks_list": [stage["k"] for stage in stages],
        "expand_ratio_list": [stage["t"] for stage in stages],
        "strides": [stage["s"] for stage in stages],
        "se": [stage["se"] for stage in stages],
        "use_v3_head": space.get("use_v3_head", False),
    }


def published_paths(config: Mapping[str, Any]) -> list[Fields] | None:
    """Return the paths of `pareto_models` in an evaluation file; None if it has no such field."""
    if "pareto_models" not in config:
        return None
    models = _mapping(config["pareto_models"], "pareto_models")
    paths = []
    for name, model in models.items():
        if isinstance(model, Mapping):  # the path of the checkpoint stands among the networks
            chosen = {field: model[field] for field in PATH_FIELDS if field in model}
            paths.append({"name": name, **chosen})
    return paths


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.{where}: expected fields, got {type(value).__name__}")
    return value


def _expect(part: Mapping[str, Any], name: str, field: str, value: object) -> None:
    """Raise `ConfigError` unless a field has the one value that the layout supports."""
    if part[field] != value:
        where = f"config.supernet_config.{name}.{field}"
        raise ConfigError(f"{where}: expected {value}, got {part[field]}")

"""Supernets of ViT-ResNAS: upstream's configuration, and the two that are published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ladderstitch.errors import ConfigError
from ladderstitch.importers.network_def import NetworkDef, read_network_def
from ladderstitch.vision.models.nested.vit_resnas import VitResnas

Fields = dict[str, Any]

UNUSED = "patch_head."
"""Tensors that only upstream's training used."""
_CHOICES = ("width_choices", "head_choices", "hidden_choices", "skippable")


def read_vit_resnas(config: Mapping[str, Any]) -> Fields:
    """Return the fields of our supernet; raises `ConfigError` or `ValidationError`."""
    if config.get("distill_token", False) is not False:
        raise ConfigError(f"config.distill_token: expected False, got {config['distill_token']}")
    net = read_network_def("config.network_def", config["network_def"])
    classes = config.get("num_classes", config.get("n_classes"))
    if net.num_classes != classes:
        raise ConfigError(f"config.num_classes: expected {net.num_classes}, got {classes}")
    if not all(net.runs):
        raise ConfigError("config.network_def: expected a supernet in which every block runs")
    names = ("stem_width", "widths", "depths", "heads", "head_dims", "hidden")
    fields = {name: getattr(net, name) for name in names}
    fields |= {name: config[name] for name in ("patch_size", *_CHOICES) if name in config}
    largest = {name: fields[name] for name in ("widths", "heads", "hidden")}
    VitResnas.model_validate({**fields, "paths": [largest]})
    return fields


def read_vit_resnas_path(config: Mapping[str, Any], number: int, path: object) -> object:
    """Return the fields of a listed path, which may be a `network_def` of upstream.

    Raises `ConfigError` if it is not a network of the supernet in `config`.
    """
    if not isinstance(path, Mapping) or "network_def" not in path:
        return path
    field = f"config.paths[{number}].network_def"
    supernet = read_network_def("config.network_def", config["network_def"])
    net = read_network_def(field, path["network_def"])
    for name in ("depths", "stem_width", "head_dims", "num_classes"):
        got, expected = getattr(net, name), getattr(supernet, name)
        if got != expected:
            hint = "; skipped blocks are listed with a 0 at their end" if name == "depths" else ""
            raise ConfigError(f"{field}: expected {name} {expected}, got {got}{hint}")
    return {k: v for k, v in path.items() if k != "network_def"} | _path_fields(net)


def _path_fields(net: NetworkDef) -> Fields:
    skipped = [block for block, runs in enumerate(net.runs) if not runs]
    return {"widths": net.widths, "heads": net.heads, "hidden": net.hidden, "skipped": skipped}


def _published(
    widths: Sequence[int], heads: Sequence[int], depth: int, choices: Mapping[str, Any]
) -> Fields:
    """Return the configuration of a supernet of three stages, three channels per hidden width."""
    network: list[Any] = [[4, widths[0]]]
    for stage, (width, count) in enumerate(zip(widths, heads, strict=True)):
        if stage:
            network.append([3, widths[stage - 1], width])
        size = _HEAD_DIMS[stage]
        network += depth * [[1, [width, count, size], [width, 3 * width], 1]]
    network.append([2, widths[-1], 1000])
    odd = [stage * depth + block for stage in range(len(widths)) for block in range(1, depth, 2)]
    return {
        "image_size": 224,
        "n_classes": 1000,
        "network_def": network,
        "skippable": odd,
        # hidden widths in steps of a quarter of the tokens' width
        "hidden_choices": [[width * n // 4 for n in range(6, 13)] for width in widths],
        **choices,
    }


_HEAD_DIMS = (32, 48, 64)
RELEASED: dict[int, Fields] = {
    256: _published(
        (256, 512, 1024),
        (6, 12, 12),
        6,
        {
            "width_choices": [[160 * n, 176 * n, 192 * n, 224 * n, 256 * n] for n in (1, 2, 4)],
            "head_choices": [[3, 4, 5, 6], [6, 8, 10, 12], [6, 8, 10, 12]],
        },
    ),
    320: _published(
        (320, 640, 1280),
        (8, 16, 16),
        7,
        {
            "width_choices": [[200 * n, 220 * n, 240 * n, 280 * n, 320 * n] for n in (1, 2, 4)],
            "head_choices": [[5, 6, 7, 8], [10, 12, 14, 16], [10, 12, 14, 16]],
        },
    ),
}
"""Supernets tiny and small by the width of their first stage, with the choices of the search."""

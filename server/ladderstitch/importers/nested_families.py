"""Import of published supernets: configuration and tensors in the upstream's layout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from ladderstitch.bundles import check_tensors, shapes_of
from ladderstitch.errors import ConfigError
from ladderstitch.importers import vit_resnas
from ladderstitch.importers.attentive_nas import IMAGE_SIZE, read_search_space
from ladderstitch.vision.models.nested.model import NestedConfig, NestedModel
from ladderstitch.vision.models.nested.sampling import sampled_config

Fields = dict[str, Any]
Tensors = Mapping[str, Tensor]

OTHER_NAMES = (
    (".bn.bn.", ".bn."),
    (".conv.conv.weight", ".conv.weight"),
    (".linear.linear.", ".linear."),
    (".linear.", ".linear.linear."),
    ("bn.", "bn.bn."),
    ("conv.weight", "conv.conv.weight"),
)
"""Names in older OFA checkpoints and their present forms, in upstream's order."""


def _ofa_resnet(config: Mapping[str, Any]) -> Fields:
    return {
        name: config[name] for name in ("depth_list", "expand_ratio_list", "width_mult_list")
    } | {name: config[name] for name in _OWN_RESNET if name in config}


def _ofa_mobilenet(config: Mapping[str, Any]) -> Fields:
    names = ("width_mult", "ks_list", "expand_ratio_list", "depth_list")
    return {name: config[name] for name in names}


def _autoformer(config: Mapping[str, Any]) -> Fields:
    fixed = {"qkv_bias": True, "scale": False, "abs_pos": True, "pre_norm": True}
    for name, value in fixed.items():
        if config.get(name, value) is not value:
            raise ConfigError(f"config.{name}: expected {value}, got {config[name]}")
    sizes = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    names = (*sizes, "relative_position", "change_qkv", "max_relative_position")
    optional = ("head_dim", "embed_dims", "depths", "heads", "mlp_ratios")
    fields = {name: config[name] for name in names}
    fields |= {name: config[name] for name in optional if name in config}
    return fields | {"global_pool": config["gp"]}


def _thinking_vit(config: Mapping[str, Any]) -> Fields:
    fixed = {"qkv_bias": True, "init_values": None, "global_pool": "token"}
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise ConfigError(f"config.{name}: expected {value}, got {config[name]}")
    names = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "thinking_stages")
    return {name: config[name] for name in names}


_OWN_RESNET = ("base_depths", "stem_width", "stage_widths", "stem_pool")
LAYOUTS: dict[str, Callable[[Mapping[str, Any]], Fields]] = {
    "ofa-resnet": _ofa_resnet,
    "ofa-mbv3": _ofa_mobilenet,
    "autoformer": _autoformer,
    "thinkingvit": _thinking_vit,
    "vit-resnas": vit_resnas.read_vit_resnas,
    "attentivenas": read_search_space,
}
"""Upstream family -> function from its configuration to the fields of our supernet."""
PATHS: dict[str, Callable[[Mapping[str, Any], int, Any], Any]] = {
    "vit-resnas": vit_resnas.read_vit_resnas_path,
}
"""Upstream family -> function from its configuration and the position and choice of a listed path
to the fields of our path, where upstream has another form."""
UNUSED = {"vit-resnas": vit_resnas.UNUSED}
"""Upstream family -> what the names of tensors without use begin with."""
IMAGE_SIZES = {"attentivenas": IMAGE_SIZE}
"""Sides of the images of families whose configurations do not state them."""

_AUTOFORMER = {
    "img_size": 224,
    "num_classes": 1000,
    "patch_size": 16,
    "mlp_ratio": 4.0,
    "gp": True,
    "relative_position": True,
    "change_qkv": True,
    "max_relative_position": 14,
}
_AUTOFORMER_SIZES: dict[int, Fields] = {
    256: {
        "depth": 14,
        "num_heads": 4,
        "embed_dims": (192, 216, 240),
        "depths": (12, 13, 14),
        "heads": (3, 4),
        "mlp_ratios": (3.5, 4.0),
    },
    448: {
        "depth": 14,
        "num_heads": 7,
        "embed_dims": (320, 384, 448),
        "depths": (12, 13, 14),
        "heads": (5, 6, 7),
        "mlp_ratios": (3.0, 3.5, 4.0),
    },
    640: {
        "depth": 16,
        "num_heads": 10,
        "embed_dims": (528, 576, 624),
        "depths": (14, 15, 16),
        "heads": (8, 9, 10),
        "mlp_ratios": (3.0, 3.5, 4.0),
    },
}
"""Supernets tiny, small and base of AutoFormer by their width, with the choices of its search."""


def released_config(family: str, tensors: Tensors) -> Fields:
    """Return the configuration of a published supernet with these tensors.

    Raises `ConfigError` if there is none.
    """
    image = {"image_size": 224, "n_classes": 1000}
    if family == "ofa-resnet":
        lists = {"depth_list": (0, 1, 2), "expand_ratio_list": (0.2, 0.25, 0.35)}
        return image | lists | {"width_mult_list": (0.65, 0.8, 1.0)}
    if family == "ofa-mbv3":
        name = next((n for n in tensors if n == "first_conv.conv.weight"), None)
        width = 1.2 if name is not None and tensors[name].shape[0] == 24 else 1.0
        lists = {"ks_list": (3, 5, 7), "expand_ratio_list": (3, 4, 6), "depth_list": (2, 3, 4)}
        return image | lists | {"width_mult": width}
    if family == "attentivenas":
        return image
    if family == "autoformer" and "pos_embed" in tensors:
        width = tensors["pos_embed"].shape[-1]
        if width in _AUTOFORMER_SIZES:
            return _AUTOFORMER | {"embed_dim": width} | _AUTOFORMER_SIZES[width]
    if family == "vit-resnas" and "tokens" in tensors:
        width = tensors["tokens"].shape[-1]
        if width in vit_resnas.RELEASED:
            return vit_resnas.RELEASED[width]
    raise ConfigError(f"config: expected a file for this {family}, got none")


def read_nested(
    family: str,
    upstream: Mapping[str, Any],
    paths: Sequence[Mapping[str, Any]] | int,
    seed: int = 0,
) -> NestedConfig:
    """Return our configuration of an upstream supernet, with these paths or that many sampled ones.

    Raises `ConfigError` naming the field that is missing or wrong.
    """
    try:
        fields = {
            "inputs": {
                "image_size": upstream.get(
                    "image_size", upstream.get("img_size", IMAGE_SIZES.get(family))
                ),
                "in_channels": upstream.get("in_channels", 3),
                "num_classes": upstream.get("num_classes", upstream.get("n_classes")),
            },
            "net": {"kind": family, **LAYOUTS[family](upstream)},
        }
        if isinstance(paths, int):
            return sampled_config(fields, paths, seed)
        read = PATHS.get(family, lambda _upstream, _number, path: path)
        fields["net"]["paths"] = [read(upstream, n, path) for n, path in enumerate(paths)]
        return NestedConfig.model_validate(fields)
    except KeyError as error:
        raise ConfigError(f"config: expected the field {error}") from error
    except ValidationError as error:
        raise ConfigError(f"config: {error}") from error


def import_nested(family: str, config: NestedConfig, tensors: Tensors) -> NestedModel:
    """Return the supernet of a state dict, in eval mode.

    Raises `BundleError` naming every missing, unknown or mis-shaped tensor.
    """
    model = config.build()
    expected = model.state_dict()
    named = {_present_name(name, expected): tensor for name, tensor in tensors.items()}
    counters = {n: t for n, t in expected.items() if n.endswith("num_batches_tracked")}
    unused = UNUSED.get(family)
    kept = counters | {n: t for n, t in named.items() if not _is_unused(n, unused)}
    check_tensors(shapes_of(expected), shapes_of(kept), where=family)
    model.load_state_dict(kept)
    return model.eval().requires_grad_(False)


def _is_unused(name: str, prefix: str | None) -> bool:
    """Return whether a tensor follows from the configuration, or served training alone."""
    of_training = prefix is not None and name.startswith(prefix)
    return of_training or name.endswith("relative_position_index") or ".bn_tracking." in name


def _present_name(name: str, known: Collection[str]) -> str:
    """Return the name that a tensor of an older OFA checkpoint has today."""
    if name in known:
        return name
    name = name.replace(".mobile_inverted_conv.", ".conv.")
    if name in known:
        return name
    for old, new in OTHER_NAMES:
        if old in name:
            return name.replace(old, new)
    return name

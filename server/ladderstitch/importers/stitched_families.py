"""Import of published stitched families: configuration and tensors in the upstream's layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from ladderstitch.bundles import check_tensors, shapes_of
from ladderstitch.errors import ConfigError
from ladderstitch.vision.models.families import FamilyConfig
from ladderstitch.vision.models.stitched import StitchedModel

Fields = dict[str, Any]
Tensors = Mapping[str, Tensor]

COMPUTED = ("relative_position_index", "attn_mask", "attention_bias_idxs")
"""Buffers that upstream stores although they follow from the configuration."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Functions that convert an upstream family's configuration and tensors to ours."""

    fields: Callable[[Mapping[str, Any]], Fields]
    tensors: Callable[[Tensors, Mapping[str, Any]], Tensors] = lambda tensors, config: tensors


def _input_fields(config: Mapping[str, Any]) -> Fields:
    return {
        "image_size": config["image_size"],
        "in_channels": config.get("in_channels", 3),
        "num_classes": config["num_classes"],
    }


def _vit_anchors(config: Mapping[str, Any], anchors: str, **extra: object) -> list[Fields]:
    """Return the fields of all ViT anchors; upstream stores some of them once for all anchors."""
    names = ("patch_size", "mlp_ratio", "qkv_bias", "layer_norm_eps")
    shared = {name: config[name] for name in names if name in config}
    return [shared | dict(anchor) | extra for anchor in config[anchors]]


def _deit(config: Mapping[str, Any]) -> Fields:
    return {
        "inputs": _input_fields(config),
        "anchors": _vit_anchors(config, "anchors"),
        "kernel_size": config["kernel_size"],
        "stride": config["stride"],
        "nearest_only": config.get("nearest_stitching", True),
        "final_norm_on_anchors": config.get("final_norm_on_anchors", True),
        "final_norm_on_stitches": config.get("final_norm_on_stitches", False),
    }


def _learngene_pool(config: Mapping[str, Any]) -> Fields:
    """Return our fields; only stitches between the smallest and the largest anchor are trained."""
    last = len(config["instances"]) - 1
    return _deit({**config, "anchors": config["instances"]}) | {
        "identity_between_equals": True,
        "trained_pairs": ((0, last),),
    }


def _snnetv2(config: Mapping[str, Any]) -> Fields:
    return {
        "family": "snnetv2",
        "inputs": _input_fields(config),
        "anchors": _vit_anchors(config, "anchors", layer_scale=True, class_token_position=False),
    }


def _swin_anchor(anchor: Mapping[str, Any], config: Mapping[str, Any]) -> Fields:
    names = ("window_size", "patch_size", "mlp_ratio", "qkv_bias", "layer_norm_eps")
    shared = {name: config[name] for name in names if name in config}
    return {"kind": "swin", **shared, **anchor}


def _swin(config: Mapping[str, Any]) -> Fields:
    anchors = [_swin_anchor(anchor, config) for anchor in config["anchors"]]
    stages = range(len(anchors[0]["depths"]) - 1)
    return _staged(config, anchors, tuple(stages))


def _resnet(config: Mapping[str, Any]) -> Fields:
    anchors = []
    for anchor in config["anchors"]:
        if anchor["kind"] == "swin":
            anchors.append(_swin_anchor(anchor, config))
        else:
            eps = {"batch_norm_eps": config.get("batch_norm_eps", 1e-5)}
            anchors.append({**anchor, **eps})
    return _staged(config, anchors, (1, 2))


def _levit(config: Mapping[str, Any]) -> Fields:
    anchors = []
    names = ("key_dim", "num_heads", "attn_ratio", "mlp_ratio", "stride")
    for anchor, operations in zip(config["anchors"], config["down_ops"], strict=True):
        anchors.append(
            {
                "kind": "levit",
                "embed_dim": anchor["embed_dim"],
                "depths": anchor["depth"],
                "num_heads": anchor["num_heads"],
                "key_dim": anchor["key_dim"],
                "attn_ratio": config["attn_ratio"],
                "mlp_ratio": config["mlp_ratio"],
                "subsamples": [dict(zip(names, op[1:], strict=True)) for op in operations],
                "distilled": config.get("distillation", True),
                "batch_norm_eps": config.get("batch_norm_eps", 1e-5),
            }
        )
    return _staged(config, anchors, tuple(range(len(config["anchors"][0]["depth"]) - 1)))


def _staged(config: Mapping[str, Any], anchors: list[Fields], stages: tuple[int, ...]) -> Fields:
    inputs = _input_fields(config)
    return {"family": "snnet-staged", "inputs": inputs, "anchors": anchors, "stages": stages}


def _fold_low_rank(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Return the tensors with SN-Netv2's W, A and B replaced by the sum W + B A / r."""
    folded = {k: v for k, v in tensors.items() if not k.endswith((".lora_A", ".lora_B"))}
    for name, down in tensors.items():
        if name.endswith(".lora_A"):
            layer = name.removesuffix(".lora_A")
            try:
                up, weight = tensors[f"{layer}.lora_B"], tensors[f"{layer}.weight"]
            except KeyError as error:
                raise ConfigError(f"{name}: expected {error} in the same file") from error
            folded[f"{layer}.weight"] = weight + up @ down / down.shape[0]
    return folded


def _rename_instances(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Return the tensors under our names; the Learngene Pool calls its anchors instances."""
    return {k.replace("instances.", "anchors.", 1): v for k, v in tensors.items()}


LAYOUTS: dict[str, Layout] = {
    "snnet-deit": Layout(_deit),
    "snnet-swin": Layout(_swin),
    "snnet-resnet": Layout(_resnet),
    "snnet-resnet-swin": Layout(_resnet),
    "snnet-levit": Layout(_levit),
    "snnetv2": Layout(_snnetv2, _fold_low_rank),
    "learngene-pool": Layout(_learngene_pool, _rename_instances),
}
"""Upstream family -> its layout."""

_CONFIG: TypeAdapter[FamilyConfig] = TypeAdapter(FamilyConfig)


def read_config(family: str, upstream: Mapping[str, Any]) -> FamilyConfig:
    """Return our configuration of an upstream family.

    Raises `ConfigError` naming the field that is missing or wrong.
    """
    if family not in LAYOUTS:
        raise ConfigError(f"family: expected one of {sorted(LAYOUTS)}, got {family!r}")
    try:
        return _CONFIG.validate_python(LAYOUTS[family].fields(upstream))
    except KeyError as error:
        raise ConfigError(f"config: expected the field {error}") from error
    except ValidationError as error:
        raise ConfigError(f"config: {error}") from error


def import_model(
    family: str, upstream: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> StitchedModel:
    """Return the model of an upstream configuration and state dict, in eval mode.

    Raises `ConfigError` if the family or its configuration is unknown, and `BundleError` naming
    every missing, unknown or mis-shaped tensor.
    """
    model = read_config(family, upstream).build()
    adapted = LAYOUTS[family].tensors(tensors, upstream)
    kept = {k: v for k, v in adapted.items() if not k.endswith(COMPUTED)}
    check_tensors(shapes_of(model.state_dict()), shapes_of(kept), where=family)
    model.load_state_dict(kept)
    return model.eval().requires_grad_(False)

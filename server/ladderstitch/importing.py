"""Published checkpoints become models: configuration and tensors under the upstream's key names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from ladderstitch.bundle import check_tensors
from ladderstitch.errors import ConfigError
from ladderstitch.models.snnet import SnNetConfig
from ladderstitch.models.stitched import StitchedModel

ANCHOR_FIELDS = ("patch_size", "mlp_ratio", "qkv_bias", "layer_norm_eps")
"""What an upstream configuration states once and every anchor of ours states for itself."""


def snnet_deit_config(upstream: Mapping[str, Any]) -> SnNetConfig:
    """Our configuration of an SN-Net DeiT family; raises `ConfigError` naming the field."""
    shared = {field: upstream[field] for field in ANCHOR_FIELDS if field in upstream}
    try:
        return SnNetConfig.model_validate(
            {
                "inputs": {
                    "image_size": upstream["image_size"],
                    "in_channels": upstream.get("in_channels", 3),
                    "num_classes": upstream["num_classes"],
                },
                "anchors": [shared | dict(anchor) for anchor in upstream["anchors"]],
                "kernel_size": upstream["kernel_size"],
                "stride": upstream["stride"],
                "nearest_only": upstream.get("nearest_stitching", True),
                "final_norm_on_anchors": upstream.get("final_norm_on_anchors", True),
                "final_norm_on_stitches": upstream.get("final_norm_on_stitches", False),
            }
        )
    except KeyError as error:
        raise ConfigError(f"config: expected the field {error}") from error
    except ValidationError as error:
        raise ConfigError(f"config: {error}") from error


CONFIGS: dict[str, Callable[[Mapping[str, Any]], SnNetConfig]] = {
    "snnet-deit": snnet_deit_config,
}
"""Reader of the upstream's configuration by family name."""


def import_model(
    family: str, upstream: Mapping[str, Any], tensors: dict[str, Tensor]
) -> StitchedModel:
    """The model of an upstream configuration and state dict, in eval mode.

    Raises `ConfigError` for a family or configuration that is not understood and `BundleError`
    that names every missing, unknown or mis-shaped tensor.
    """
    if family not in CONFIGS:
        raise ConfigError(f"family: expected one of {sorted(CONFIGS)}, got {family!r}")
    model = CONFIGS[family](upstream).build()
    check_tensors(model.state_dict(), tensors, where=family)
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)

"""The union of all family configurations; each one enumerates its networks and builds the model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Tag

from ladderstitch.vision.models.nested.model import NestedConfig
from ladderstitch.vision.models.snnet import SnNetConfig, SnNetV2Config
from ladderstitch.vision.models.snnet_staged import StagedConfig
from ladderstitch.vision.networks.config import OnnxConfig


def _family(value: object) -> str:
    """Return the family's name; a configuration without one is `snnet`, the oldest family."""
    if isinstance(value, dict):
        return str(value.get("family", "snnet"))
    return str(getattr(value, "family", "snnet"))


FamilyConfig = Annotated[
    Annotated[SnNetConfig, Tag("snnet")]
    | Annotated[StagedConfig, Tag("snnet-staged")]
    | Annotated[SnNetV2Config, Tag("snnetv2")],
    Discriminator(_family),
]
"""Families of anchors that are torch modules, which can be trained and stitched."""

AnyConfig = Annotated[
    Annotated[SnNetConfig, Tag("snnet")]
    | Annotated[StagedConfig, Tag("snnet-staged")]
    | Annotated[SnNetV2Config, Tag("snnetv2")]
    | Annotated[NestedConfig, Tag("nested")]
    | Annotated[OnnxConfig, Tag("onnx")],
    Discriminator(_family),
]
"""All families that a bundle may hold."""

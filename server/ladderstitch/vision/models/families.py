"""Every family that can be built: a configuration that enumerates its networks and makes them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Tag

from ladderstitch.vision.models.snnet import SnNetConfig, SnNetV2Config
from ladderstitch.vision.models.snnet_staged import StagedConfig


def _family(value: object) -> str:
    """Which configuration this is; one without a name is of the first family there was."""
    if isinstance(value, dict):
        return str(value.get("family", "snnet"))
    return str(getattr(value, "family", "snnet"))


FamilyConfig = Annotated[
    Annotated[SnNetConfig, Tag("snnet")]
    | Annotated[StagedConfig, Tag("snnet-staged")]
    | Annotated[SnNetV2Config, Tag("snnetv2")],
    Discriminator(_family),
]

"""How a standard model becomes a ladder: a committed file."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ladderstitch.errors import ConfigError


class LadderRecipe(BaseModel):
    """Which layers read late, and how they are retrained to say what the standard model says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="of the new path")
    ladder_layers: int = Field(gt=0, description="the last so many layers become ladder layers")
    rank: int = Field(32, gt=0, description="of what is added to each matrix of these layers")
    tokens: int = Field(gt=0, description="of text that is trained on, in each epoch the same")
    window: int = Field(256, gt=1, description="tokens that are read together")
    batch_windows: int = Field(8, gt=0)
    epochs: int = Field(1, gt=0)
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(10, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    seed: int = 0
    held_out_tokens: int = Field(8192, gt=0, description="that qualities are measured on")
    held_out_window: int = Field(512, gt=1)
    untrained: tuple[int, ...] = Field(
        (), description="ladder layer counts to measure without training, for comparison"
    )

    @classmethod
    def load(cls, path: Path) -> LadderRecipe:
        """Raises `ConfigError` that names the field."""
        try:
            return cls.model_validate(yaml.safe_load(path.read_text()))
        except (OSError, yaml.YAMLError, ValidationError) as error:
            raise ConfigError(f"{path}: {error}") from error

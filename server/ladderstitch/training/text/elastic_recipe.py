"""The recipe of a stitched language family, a YAML file: sizes, anchors and schedules."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ladderstitch.errors import ConfigError
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.family import DecoderFamily
from ladderstitch.text.model.residual import ResidualScheme
from ladderstitch.training.text.scratch import ScratchRecipe

ANCHOR_RUN = "ladder"
"""Name of an anchor's run in its checkpoint and log."""


class SharedSizes(BaseModel):
    """The sizes that all anchors share, so that their keys and values have the same shape."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = Field(gt=0)
    layers: int = Field(gt=1, description="of anchors without a number of their own")
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    max_positions: int = Field(gt=0)
    rope_theta: float = Field(10_000.0, gt=0)
    tied_head: bool = True


class Anchor(BaseModel):
    """The sizes of one anchor, and the peak learning rate of its training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    heads: int = Field(gt=0)
    layers: int | None = Field(None, gt=1, description="unset: those of `sizes`")
    learning_rate: float = Field(1.5e-3, gt=0)


class AnchorSchedule(BaseModel):
    """The schedule of the anchors' training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int = Field(gt=0, description="training tokens of each anchor; repeated text counts")
    window: int = Field(256, gt=1)
    batch_windows: int = Field(16, gt=0)
    warmup_steps: int = Field(50, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    measure_steps: int = Field(100, gt=0, description="steps between two held-out losses")
    threads: int = Field(1, gt=0, description="torch threads; results depend on it as on the seed")


class StitchSchedule(BaseModel):
    """The schedule of least squares and of the switch-aware training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fit_tokens: int = Field(16_384, gt=0, description="tokens of the least squares")
    tokens: int = Field(ge=0, description="training tokens; 0 keeps the least-squares maps")
    window: int = Field(256, gt=1)
    batch_windows: int = Field(16, gt=0)
    segment: int = Field(32, gt=0, description="tokens that take the same path")
    learning_rate: float = Field(1e-3, gt=0, description="peak rate of the stitching maps")
    anchor_learning_rate_factor: float = Field(0.1, ge=0, description="anchors' rate over maps'")
    train_largest: bool = Field(True, description="whether the largest anchor is trained too")
    warmup_steps: int = Field(20, ge=0)
    weight_decay: float = Field(0.1, ge=0, description="of the anchors' matrices")
    anchor_share: float = Field(
        0.5, ge=0, le=1, description="share of segments that run a single anchor"
    )
    switch_share: float = Field(
        0.5, ge=0, le=1, description="share of steps whose windows change path only once"
    )
    distillation: float = Field(1.0, ge=0, description="weight of KL(largest anchor || path)")
    translation: float = Field(
        0.0, ge=0, description="weight of the error of translated keys and values"
    )
    measure_steps: int = Field(100, gt=0, description="steps between two measurements")
    threads: int = Field(2, gt=0, description="torch threads; results depend on it as on the seed")

    @property
    def steps(self) -> int:
        """Number of steps of the switch-aware training."""
        return self.tokens // (self.window * self.batch_windows)

    @property
    def trains_anchors(self) -> bool:
        """Whether anchors are trained, too, or maps only."""
        return self.anchor_learning_rate_factor > 0


class SwitchMeasure(BaseModel):
    """Where the measured switch is, and how long its effect is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    context: int = Field(256, gt=0, description="tokens before the switch")
    tokens: int = Field(64, gt=0, description="tokens after it")
    windows: int = Field(64, gt=0, description="number of texts")


class ElasticRecipe(BaseModel):
    """The content of a recipe file; see `examples/elastic-text/recipe.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    seed: int = 0
    sizes: SharedSizes
    anchors: dict[str, Anchor] = Field(min_length=2, description="anchors by name, smallest first")
    residual: ResidualScheme = ResidualScheme(scheme="ladder")
    training: AnchorSchedule
    stitching: StitchSchedule
    switch: SwitchMeasure = SwitchMeasure()
    held_out_tokens: int = Field(32_768, gt=0)
    licence: str = "not stated"

    @model_validator(mode="after")
    def _check_anchors(self) -> ElasticRecipe:
        widths = [anchor.hidden_size for anchor in self.anchors.values()]
        if widths != sorted(set(widths)):
            raise ValueError(f"anchors: expected ascending hidden sizes, got {widths}")
        longest = max(self.stitching.window, self.training.window)
        longest = max(longest, self.switch.context + self.switch.tokens)
        if longest > self.sizes.max_positions:
            raise ValueError(
                f"sizes.max_positions: expected at least {longest}, the longest window, got "
                f"{self.sizes.max_positions}"
            )
        if self.residual.scheme not in ("standard", "ladder"):
            raise ValueError(
                f"residual.scheme: expected standard or ladder, got {self.residual.scheme}"
            )
        if self.residual.ladder_layers is not None and len(set(self.family.depths)) > 1:
            raise ValueError(
                "residual.ladder_layers: expected none for anchors of different depths, got "
                f"{self.residual.ladder_layers}"
            )
        if self.stitching.window % self.stitching.segment:
            raise ValueError(
                f"stitching.segment: expected a divisor of the window {self.stitching.window}, got "
                f"{self.stitching.segment}"
            )
        return self

    @classmethod
    def load(cls, path: Path) -> ElasticRecipe:
        """Return the recipe in a YAML file; raises `ConfigError` that names the wrong field."""
        try:
            return cls.model_validate(yaml.safe_load(path.read_text()))
        except (OSError, yaml.YAMLError, ValidationError) as error:
            raise ConfigError(f"{path}: {error}") from error

    @property
    def configs(self) -> tuple[DecoderConfig, ...]:
        """The configurations of the anchors, smallest first."""
        own = {"hidden_size", "intermediate_size", "heads", "layers"}
        return tuple(
            DecoderConfig(
                **self.sizes.model_dump() | anchor.model_dump(include=own, exclude_none=True)
            )
            for anchor in self.anchors.values()
        )

    @property
    def family(self) -> DecoderFamily:
        """The anchors as a family."""
        return DecoderFamily(self.configs)

    def anchor_recipe(self, name: str) -> ScratchRecipe:
        """Return the recipe of an anchor's training."""
        config = self.configs[list(self.anchors).index(name)]
        return ScratchRecipe(
            config=config,
            schemes={ANCHOR_RUN: self.residual},
            learning_rate=self.anchors[name].learning_rate,
            seed=self.seed,
            held_out_tokens=self.held_out_tokens,
            **self.training.model_dump(exclude={"threads"}),
        )

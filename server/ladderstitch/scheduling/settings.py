"""The operator's scheduling settings, which may change while the server runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

PolicyName = Literal["fixed", "max_quality", "max_batch", "slackfit", "model_switching", "adaptive"]
POLICY_NAMES: tuple[PolicyName, ...] = get_args(PolicyName)

CacheMode = Literal["project", "write-through", "catch-up", "recompute", "anytime"]
"""What happens to keys and values that the new variant of an answer lacks.

`project` translates them when the variant changes, `write-through` when a token is computed, for
all variants. `catch-up` computes the tokens again from the first one that the new variant did not
compute, `recompute` all of them. `anytime` translates them, and computes them again in idle time.
"""


class SchedulerSettings(BaseModel):
    """The operator's scheduling settings; a change applies from the next batch on."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    policy: PolicyName = Field(
        "adaptive",
        description="how variants and batches are chosen; for language models all policies but "
        "`fixed` and `max_quality` are the same",
    )
    fixed_variant: int | None = Field(
        None, ge=0, description="variant id that the policy `fixed` always uses"
    )
    pinned_variant: int | None = Field(
        None, ge=0, description="variant id that overrides the policy; unset: none"
    )
    min_quality: float = Field(
        0.0, ge=0, le=1, description="lowest quality that any request is answered with"
    )
    slackfit_buckets: int = Field(
        64, ge=1, le=4096, description="latency buckets of the policy `slackfit`; image models only"
    )
    queue_limit_requests: int = Field(1024, ge=1, description="requests that may wait")
    queue_limit_s: float = Field(10.0, gt=0, description="seconds of estimated work that may wait")
    attainment_probability: float = Field(
        0.99, gt=0, lt=1, description="probability that a batch planned to fit a budget does fit"
    )
    priority_window_s: float = Field(
        0.1,
        ge=0,
        allow_inf_nan=False,
        description="seconds that the highest priority moves a deadline forward; image models only",
    )
    overhead_s: float = Field(
        0.0005,
        ge=0,
        allow_inf_nan=False,
        description="seconds reserved for writing an answer; image models only",
    )

    audit_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of answers of which an image runs again on the best variant, in idle "
        "time and at most 2 % of it; image classifiers only",
    )

    change_variants: bool = Field(
        True,
        description="whether an answer may go on with another variant; language models only",
    )
    cache_mode: CacheMode = Field(
        "anytime",
        description="what happens to cached keys and values that the new variant of an answer "
        "lacks; language models only",
    )

    @model_validator(mode="after")
    def _check_fixed_variant(self) -> SchedulerSettings:
        if self.policy == "fixed" and self.fixed_variant is None:
            raise ValueError(
                "fixed_variant: expected a variant id for the policy `fixed`, got none"
            )
        return self


@dataclass(frozen=True, slots=True)
class ActiveSettings:
    """The settings that apply now; `revision` counts the changes since the start."""

    revision: int
    settings: SchedulerSettings

    def with_changes(self, changes: dict[str, Any]) -> ActiveSettings:
        """Return the settings after a change of the given fields, one revision later.

        A change that leaves all fields as they are returns these settings and counts no revision: a
        gateway sends every change to all replicas, which may share their settings. Raises
        pydantic's `ValidationError` if a field or a value is not valid.
        """
        settings = SchedulerSettings.model_validate(self.settings.model_dump() | changes)
        return self if settings == self.settings else ActiveSettings(self.revision + 1, settings)

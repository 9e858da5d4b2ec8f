"""How an operator wants requests scheduled; may change while the server runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

PolicyName = Literal["fixed", "max_quality", "max_batch", "slackfit", "model_switching", "adaptive"]
POLICY_NAMES: tuple[PolicyName, ...] = get_args(PolicyName)


class SchedulerSettings(BaseModel):
    """Checked when made; swapped between batches without losing a request."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: PolicyName = "adaptive"
    stitch: int | None = Field(None, ge=0, description="the stitch of the policy `fixed`")
    pinned_stitch: int | None = Field(None, ge=0, description="overrides the policy")
    min_quality: float = Field(0.0, ge=0, le=1, description="floor for every request")
    slackfit_buckets: int = Field(64, ge=1, le=4096)
    queue_limit_requests: int = Field(1024, ge=1)
    queue_limit_s: float = Field(10.0, gt=0, description="estimated work that may wait")
    attainment_probability: float = Field(
        0.99, gt=0, lt=1, description='how sure "fits the budget" has to be'
    )
    priority_window_s: float = Field(
        0.1, ge=0, description="how much earlier a deadline the highest priority is worth"
    )
    overhead_s: float = Field(
        0.0005, ge=0, description="reserved for writing the answer; waking the engine is learned"
    )

    @model_validator(mode="after")
    def _fixed_names_a_stitch(self) -> SchedulerSettings:
        if self.policy == "fixed" and self.stitch is None:
            raise ValueError("stitch: the policy `fixed` needs one")
        return self


@dataclass(frozen=True, slots=True)
class LiveSettings:
    """The scheduling in force, and how many changes led to it."""

    revision: int
    settings: SchedulerSettings


def merged(live: LiveSettings, changes: dict[str, Any]) -> LiveSettings:
    """The settings after a change, checked anew, one revision later."""
    fields = live.settings.model_dump() | changes
    return LiveSettings(live.revision + 1, SchedulerSettings.model_validate(fields))

"""Policies, which choose the requests that run next as one batch and the variant they run on."""

from __future__ import annotations

from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.vision.scheduler.policies.adaptive import Adaptive
from ladderstitch.vision.scheduler.policies.base import Policy
from ladderstitch.vision.scheduler.policies.baselines import (
    Fixed,
    MaxBatch,
    MaxQuality,
    ModelSwitching,
    SlackFit,
)
from ladderstitch.vision.scheduler.policies.demand import QualityHulls
from ladderstitch.vision.scheduler.policies.forecast import ArrivalForecast


def make_policy(
    settings: SchedulerSettings,
    candidates: CandidateFilter,
    forecast: ArrivalForecast,
    hulls: QualityHulls,
) -> Policy:
    """Return the policy that the settings name."""
    match settings.policy:
        case "fixed":
            return Fixed(candidates, settings.overhead_s)
        case "max_quality":
            return MaxQuality(candidates, settings.overhead_s)
        case "max_batch":
            return MaxBatch(candidates, settings.overhead_s)
        case "slackfit":
            return SlackFit(candidates, settings.slackfit_buckets, settings.overhead_s)
        case "model_switching":
            return ModelSwitching(candidates, settings.overhead_s, forecast)
        case "adaptive":
            return Adaptive(candidates, settings.overhead_s, forecast, hulls)


__all__ = ["make_policy"]

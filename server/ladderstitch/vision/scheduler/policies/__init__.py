"""Policies: which requests run next, together, on which stitch."""

from __future__ import annotations

from ladderstitch.scheduling.candidates import Menu
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
from ladderstitch.vision.scheduler.policies.demand import Forecast
from ladderstitch.vision.scheduler.policies.quality_hull import Prices


def make_policy(
    settings: SchedulerSettings, menu: Menu, forecast: Forecast, prices: Prices
) -> Policy:
    """The policy that the settings name."""
    match settings.policy:
        case "fixed":
            return Fixed(menu, settings.overhead_s)
        case "max_quality":
            return MaxQuality(menu, settings.overhead_s)
        case "max_batch":
            return MaxBatch(menu, settings.overhead_s)
        case "slackfit":
            return SlackFit(menu, settings.slackfit_buckets, settings.overhead_s)
        case "model_switching":
            return ModelSwitching(menu, settings.overhead_s, forecast)
        case "adaptive":
            return Adaptive(menu, settings.overhead_s, forecast, prices)


__all__ = ["make_policy"]

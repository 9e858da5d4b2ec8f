"""From the name of a policy to the policy."""

from __future__ import annotations

from ladderstitch.scheduling.adaptive import Adaptive
from ladderstitch.scheduling.arrivals import Forecast
from ladderstitch.scheduling.menu import Menu
from ladderstitch.scheduling.model_switching import ModelSwitching
from ladderstitch.scheduling.policy import Fixed, MaxBatch, MaxQuality, Policy, SlackFit
from ladderstitch.scheduling.prices import Prices
from ladderstitch.scheduling.settings import SchedulerSettings


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

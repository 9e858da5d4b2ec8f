"""The scheduling in force while servers run, and how a change of it comes about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ladderstitch.scheduling.settings import SchedulerSettings


@dataclass(frozen=True, slots=True)
class LiveSettings:
    """The scheduling in force, and how many changes led to it."""

    revision: int
    settings: SchedulerSettings


def merged(live: LiveSettings, changes: dict[str, Any]) -> LiveSettings:
    """The settings after a change, checked anew, one revision later."""
    fields = live.settings.model_dump() | changes
    return LiveSettings(live.revision + 1, SchedulerSettings.model_validate(fields))

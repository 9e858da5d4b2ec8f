"""Ray Serve's way to the scaling decision: `ladderstitch.ray_serve.autoscaler:SlackPolicy`.

Serve adds bounds, delays and factors of its own (`min_replicas`, `downscale_delay_s`, ...).
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, get_args

from ray.util.metrics import Gauge

from ladderstitch.replica.autoscaling import (
    LoadSample,
    ScalingDecision,
    ScalingGoals,
    State,
    decide,
)

log = logging.getLogger(__name__)


class SlackPolicy:
    """Runs in Serve's controller; `policy_kwargs` are the fields of `ScalingGoals`."""

    def __init__(self, **goals: Any) -> None:
        """Raises pydantic's `ValidationError` that names the field."""
        self.goals = ScalingGoals.model_validate(goals)
        self._state: State = "steady"
        self._states = Gauge(
            "ladderstitch_scaling", "1 for what the autoscaler is doing.", tag_keys=("state",)
        )
        self._wanted = Gauge("ladderstitch_wanted_replicas", "Replicas that the load needs.")

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Serve's `AutoscalingContext` -> replicas, and a state that Serve keeps for its delays."""
        loads = loads_of(context.aggregated_metrics or {})
        replicas = context.target_num_replicas
        verdict = decide(loads, max(1, context.current_num_replicas), self.goals)
        self._tell(verdict)
        if verdict.state in ("steady", "spending_quality"):
            return replicas, {}  # those that are on their way still come
        return verdict.replicas, {}

    def _tell(self, verdict: ScalingDecision) -> None:
        if verdict.state != self._state:
            log.info("%s: %d replicas wanted", verdict.state, verdict.replicas)
            self._state = verdict.state
        self._wanted.set(verdict.replicas)
        for state in get_args(State):
            self._states.set(int(state == verdict.state), {"state": state})


def loads_of(metrics: Mapping[str, Mapping[Any, float]]) -> list[LoadSample]:
    """Serve's metric -> replica -> value, turned round."""
    stats: dict[Any, dict[str, float]] = defaultdict(dict)
    for name, values in metrics.items():
        for replica, value in values.items():
            stats[replica][name] = value
    return [LoadSample.of(each) for each in stats.values()]

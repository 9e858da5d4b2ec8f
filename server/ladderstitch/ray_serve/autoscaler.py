"""Autoscaling policy for Ray Serve: `ladderstitch.ray_serve.autoscaler:SlackPolicy`.

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
    """Policy that runs in Serve's controller; `policy_kwargs` are the fields of `ScalingGoals`.

    Raises pydantic's `ValidationError` that names an invalid field.
    """

    def __init__(self, **goals: Any) -> None:
        self.goals = ScalingGoals.model_validate(goals)
        self._state: State = "steady"
        self._states = Gauge(
            "ladderstitch_scaling",
            "1 for the state that the autoscaler is in, 0 for the others.",
            tag_keys=("state",),
        )
        self._desired = Gauge(
            "ladderstitch_desired_replicas", "Number of replicas that the load needs."
        )

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return the target number of replicas for an `AutoscalingContext`.

        The second value is the state that Serve keeps for its delays; it is always empty.
        """
        loads = load_samples(context.aggregated_metrics or {})
        decision = decide(loads, max(1, context.current_num_replicas), self.goals)
        self._publish(decision)
        if decision.state in ("steady", "spending_quality"):
            return context.target_num_replicas, {}  # replicas that are starting are kept
        return decision.replicas, {}

    def _publish(self, decision: ScalingDecision) -> None:
        if decision.state != self._state:
            log.info("scaling state=%s replicas=%d", decision.state, decision.replicas)
            self._state = decision.state
        self._desired.set(decision.replicas)
        for state in get_args(State):
            self._states.set(int(state == decision.state), {"state": state})


def load_samples(metrics: Mapping[str, Mapping[Any, float]]) -> list[LoadSample]:
    """Return one sample per replica from Serve's mapping: metric -> replica -> value."""
    stats: dict[Any, dict[str, float]] = defaultdict(dict)
    for name, values in metrics.items():
        for replica, value in values.items():
            stats[replica][name] = value
    return [LoadSample.from_stats(each) for each in stats.values()]

"""The autoscaling policy of Ray Serve: its context in, the target number of replicas out."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROBE = """
import json, types
from ladderstitch.replica.autoscaling import LoadSample, VariantCost
from ladderstitch.ray_serve.autoscaler import SlackPolicy

variants = (VariantCost(0.002, 0.8), VariantCost(0.005, 0.9))

def context(current, target, demand):
    stats = LoadSample(demand / current, 0.5, 1.0, variants).to_stats()
    metrics = {name: {f"r{i}": value for i in range(current)} for name, value in stats.items()}
    return types.SimpleNamespace(
        aggregated_metrics=metrics, current_num_replicas=current, target_num_replicas=target)

policy = SlackPolicy(quality=0.9, utilization=0.5)
found = {
    "more load": policy(context(1, 1, 250.0))[0],
    "starting replicas are kept": policy(context(2, 3, 190.0))[0],
    "less load": policy(context(3, 3, 50.0))[0],
    "steady load": policy(context(1, 1, 90.0))[0],
    "no load known": policy(types.SimpleNamespace(
        aggregated_metrics=None, current_num_replicas=1, target_num_replicas=2))[0],
}
try:
    SlackPolicy(qality=0.9)
except ValueError as error:
    found["misspelt"] = "qality" in str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, object]:
    """Return the policy's answers from a separate process: Ray reads its environment on import."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=500, check=True
    )
    answers: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_slack_policy_returns_the_replicas_the_load_needs(found: dict[str, object]) -> None:
    assert found == {
        "more load": 3,
        "starting replicas are kept": 3,
        "less load": 1,
        "steady load": 1,
        "no load known": 2,
        "misspelt": True,
    }

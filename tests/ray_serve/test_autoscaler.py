"""Serve's side of the scaling decision: its context in, its target out."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROBE = """
import json, types
from ladderstitch.replica.autoscaling import LoadSample, VariantCost
from ladderstitch.ray_serve.autoscaler import SlackPolicy

offers = (VariantCost(0.002, 0.8), VariantCost(0.005, 0.9))

def context(current, target, demand):
    stats = LoadSample(demand / current, 0.5, 1.0, offers).stats()
    metrics = {name: {f"r{i}": value for i in range(current)} for name, value in stats.items()}
    return types.SimpleNamespace(
        aggregated_metrics=metrics, current_num_replicas=current, target_num_replicas=target)

policy = SlackPolicy(quality=0.9, busy=0.5)
found = {
    "more": policy(context(1, 1, 250.0))[0],
    "waits for those on their way": policy(context(2, 3, 190.0))[0],
    "fewer": policy(context(3, 3, 50.0))[0],
    "as it is": policy(context(1, 1, 90.0))[0],
    "nothing known": policy(types.SimpleNamespace(
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
    """In a process of its own: Ray reads its environment when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=500, check=True
    )
    answers: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_serve_is_told_what_the_load_needs(found: dict[str, object]) -> None:
    assert found == {
        "more": 3,
        "waits for those on their way": 3,
        "fewer": 1,
        "as it is": 1,
        "nothing known": 2,
        "misspelt": True,
    }

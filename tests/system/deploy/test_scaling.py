"""Ray's own autoscaler, the chart's policy and our server: replicas and nodes follow the load.

Nodes are processes of this machine. `make verify-operations` is the long form, with a plot.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.timeout(1800)
def test_replicas_and_nodes_follow_the_load_and_nothing_is_lost() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/verify_operations.py", "--short"],
        capture_output=True,
        text=True,
        timeout=1700,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    scaled = json.loads(done.stdout[done.stdout.index("\n{") :])["scale"]
    assert scaled["codes"] == {"OK": scaled["requests"]}
    assert scaled["requests"] > 100
    assert (scaled["most_replicas"], scaled["last_replicas"]) == (2, 1)
    assert (scaled["most_nodes"], scaled["last_nodes"]) == (2, 1)

"""Ray's autoscaler with the chart's policy: replicas and nodes follow the load.

Nodes are processes of this machine. `make verify-operations` runs the long version with a plot.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.timeout(1800)
def test_autoscaler_follows_load_and_loses_no_request() -> None:
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

"""Declarative deployment on Ray Serve: `user_config` reaches running replicas in place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from ladderstitch.runtime.process import free_port
from tests.conftest import make_tiny_bundle

ROOT = Path(__file__).resolve().parents[3]


def test_user_config_and_admin_change_last_write_wins(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "tiny").path
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.system.ray_serve.deployment_probe",
            str(bundle),
            str(free_port("127.0.0.1")),
            str(free_port("127.0.0.1")),
        ],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["same_replica"]
    assert seen["after_admin"] == 2
    assert seen["after_repeat"] == 2
    assert seen["revision"] == 4

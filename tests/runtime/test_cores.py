"""Tests of the cores that a process may use, with files of cgroups that the tests write."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ladderstitch.runtime.cores import CgroupFiles, resolve_threads, usable_cores

AFFINITY = 16


def write_files(folder: Path, membership: str, limits: dict[str, str]) -> CgroupFiles:
    """Write a membership file and the files of limits, by their paths below the root."""
    files = CgroupFiles(folder / "cgroup", folder / "root")
    files.membership.write_text(membership)
    for name, content in limits.items():
        path = files.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return files


def v1(folder: str, quota: str, period: str = "100000") -> dict[str, str]:
    """Return the files of one group of version 1."""
    return {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": period}


@pytest.mark.parametrize(
    ("membership", "limits", "cores"),
    [
        ("0::/pod\n", {"pod/cpu.max": "400000 100000\n"}, 4),
        ("0::/pod\n", {"pod/cpu.max": "350000 100000\n"}, 3),
        ("0::/pod\n", {"pod/cpu.max": "50000 100000\n"}, 1),
        ("0::/pod\n", {"pod/cpu.max": "9900000 100000\n"}, AFFINITY),
        ("0::/pod\n", {"pod/cpu.max": "max 100000\n"}, AFFINITY),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000", "a/cpu.max": "300000 100000"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "800000 100000", "cpu.max": "600000 100000"}, 6),
        ("0::/../other\n", {"cpu.max": "300000 100000"}, 3),
        ("4:cpu,cpuacct:/job\n0::/\n", v1("cpu,cpuacct/job", "250000"), 2),
        ("4:cpuacct,cpu:/job\n", v1("cpu/job", "500000"), 5),
        ("4:cpu,cpuacct:/docker/1\n", v1("cpu,cpuacct", "300000"), 3),
        ("4:cpu:/job\n", v1("cpu/job", "-1"), AFFINITY),
        ("4:cpu:/a/b\n", v1("cpu/a/b", "-1") | v1("cpu/a", "700000"), 7),
        ("4:cpuset:/job\n", v1("cpuset/job", "200000"), AFFINITY),
        ("4:cpu:/job\n0::/job\n", v1("cpu/job", "300000") | {"unified/cpu.max": "max 100000"}, 3),
        ("0::/pod\n", {}, AFFINITY),
    ],
)
def test_usable_cores_is_the_smallest_limit(
    tmp_path: Path, membership: str, limits: dict[str, str], cores: int
) -> None:
    assert usable_cores(write_files(tmp_path, membership, limits), AFFINITY) == cores


@pytest.mark.parametrize(
    ("membership", "limits"),
    [
        ("nonsense\n", {}),
        ("0::/pod\n", {"pod/cpu.max": ""}),
        ("0::/pod\n", {"pod/cpu.max": "many 100000"}),
        ("0::/pod\n", {"pod/cpu.max": "-200000 100000"}),
        ("0::/pod\n", {"pod/cpu.max": "200000 0"}),
        ("4:cpu:/job\n", v1("cpu/job", "many")),
        ("4:cpu:/job\n", {"cpu/job/cpu.cfs_quota_us": "200000"}),
    ],
)
def test_usable_cores_malformed_file_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, membership: str, limits: dict[str, str]
) -> None:
    assert usable_cores(write_files(tmp_path, membership, limits), AFFINITY) == AFFINITY
    assert "CPU quota ignored" in caplog.text


def test_usable_cores_absent_membership_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert usable_cores(CgroupFiles(tmp_path / "none", tmp_path), AFFINITY) == AFFINITY
    assert "CPU quota ignored" in caplog.text


def test_usable_cores_of_this_process_is_positive() -> None:
    assert usable_cores() >= 1


@pytest.mark.parametrize(
    ("cores", "ranks", "replicas", "reserve_core", "threads"),
    [
        (1, 1, 1, True, 1),
        (2, 1, 1, True, 2),
        (3, 1, 1, True, 2),
        (8, 1, 1, True, 7),
        (8, 1, 1, False, 8),
        (9, 2, 1, True, 4),
        (8, 2, 2, True, 1),
        (16, 3, 2, False, 2),
        (2, 4, 1, True, 1),
        (2, 1, 4, True, 1),
    ],
)
def test_resolve_threads_auto_shares_the_cores(
    cores: int, ranks: int, replicas: int, reserve_core: bool, threads: int
) -> None:
    found = resolve_threads(
        "auto", ranks=ranks, replicas=replicas, reserve_core=reserve_core, cores=cores
    )
    assert found == threads


def test_resolve_threads_logs_only_auto(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ladderstitch.runtime.cores"):
        assert resolve_threads(5, ranks=2, reserve_core=True) == 5
        assert not caplog.records
        resolve_threads("auto", cores=4)
    assert [record.getMessage() for record in caplog.records] == [
        "threads resolved: auto=4 cores=4 replicas=1 ranks=1"
    ]

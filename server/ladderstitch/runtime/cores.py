"""The cores that this process may use, by its affinity and the quotas of its control groups."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias

log = logging.getLogger(__name__)

Threads: TypeAlias = int | Literal["auto"]
"""A number of computing threads; `auto` stands for that of `resolve_threads`."""


@dataclass(frozen=True, slots=True)
class CgroupFiles:
    """The places where Linux lists the control groups (cgroups) of a process and their limits."""

    membership: Path = Path("/proc/self/cgroup")
    root: Path = Path("/sys/fs/cgroup")


def resolve_threads(
    threads: Threads,
    *,
    ranks: int = 1,
    replicas: int = 1,
    reserve_core: bool = False,
    cores: int | None = None,
) -> int:
    """Return the number of computing threads of one rank; `auto` is its share of the cores.

    The cores are divided by the replicas on this machine and by the ranks of each. `reserve_core`
    keeps one core of a replica with more than two for its event loop. `cores` unset: those of
    `usable_cores`. The result of `auto` is logged.
    """
    if threads != "auto":
        return threads
    usable = usable_cores() if cores is None else cores
    share = usable // replicas
    if reserve_core and share > 2:
        share -= 1
    resolved = max(1, share // ranks)
    log.info(
        "threads resolved: auto=%d cores=%d replicas=%d ranks=%d", resolved, usable, replicas, ranks
    )
    return resolved


def _allowed_cores() -> int:
    """Return the cores of the affinity mask; all of the machine on systems without such masks."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_cores(files: CgroupFiles | None = None, affinity: int | None = None) -> int:
    """Return the number of cores that this process may use, at least 1.

    It is the smallest of the affinity mask and of the CPU quotas (versions 1 and 2) of its cgroup
    and all parents, rounded down. `affinity` unset: that of this process. Without a readable quota
    the affinity counts alone.
    """
    cores = _allowed_cores() if affinity is None else affinity
    try:
        quotas = [*_read_quotas(files or CgroupFiles())]
    except (OSError, ValueError) as error:
        log.warning("CPU quota ignored, cores are those of the affinity mask: %s", error)
        quotas = []
    return max(1, min([cores, *map(int, quotas)]))


def _read_quotas(files: CgroupFiles) -> Iterator[float]:
    """Yield the limits of all cgroups of this process, in cores.

    Raises `OSError` or `ValueError` if a file cannot be read or has another format.
    """
    for line in files.membership.read_text().splitlines():
        fields = line.split(":", 2)
        if len(fields) != 3:
            raise ValueError(f"{files.membership}: expected ID:CONTROLLERS:PATH, got {line!r}")
        number, controllers, group = fields
        if number == "0" and not controllers:
            for mount in (files.root, files.root / "unified"):  # the latter along with version 1
                yield from _limits(_read_v2(folder) for folder in _group_folders(mount, group))
        elif "cpu" in controllers.split(","):
            for mount in {files.root / controllers, files.root / "cpu"}:
                yield from _limits(_read_v1(folder) for folder in _group_folders(mount, group))


def _limits(found: Iterator[float | None]) -> Iterator[float]:
    return (limit for limit in found if limit is not None)


def _group_folders(mount: Path, group: str) -> Iterator[Path]:
    """Yield the folders of a cgroup and its parents, up to the one that is mounted.

    In a container, the mounted one may be the process's own, and `group` its path on the host.
    """
    parts = PurePosixPath(group.lstrip("/")).parts
    if ".." not in parts:  # the group is outside of what is mounted
        for length in range(len(parts), 0, -1):
            yield mount.joinpath(*parts[:length])
    yield mount


def _read_v2(folder: Path) -> float | None:
    """Return the limit in `cpu.max` in cores, None for none; raises `ValueError` if malformed."""
    file = folder / "cpu.max"
    if not file.exists():
        return None
    fields = file.read_text().split()
    if len(fields) != 2:
        raise ValueError(f"{file}: expected QUOTA PERIOD, got {' '.join(fields)!r}")
    return None if fields[0] == "max" else _ratio(file, *fields)


def _read_v1(folder: Path) -> float | None:
    """Return the limit of a cgroup of version 1 in cores, like `_read_v2`."""
    file, period = folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"
    if not file.exists():
        return None
    quota = file.read_text().strip()
    return None if quota == "-1" else _ratio(file, quota, period.read_text().strip())


def _ratio(file: Path, quota: str, period: str) -> float:
    if not (quota.isdecimal() and period.isdecimal()) or int(period) == 0:
        raise ValueError(f"{file}: expected microseconds, got {quota!r} of {period!r}")
    return int(quota) / int(period)

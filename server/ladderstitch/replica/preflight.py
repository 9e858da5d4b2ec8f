"""Checks of everything that a server needs before it starts (`ladderstitch doctor`)."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement

from ladderstitch.addresses import join_address
from ladderstitch.api.listener import ListenerConfig
from ladderstitch.config import ServerConfig
from ladderstitch.errors import UserError
from ladderstitch.hosting.model_manager import make_runner
from ladderstitch.hosting.registry import ModelRegistry
from ladderstitch.runtime.cores import resolve_threads, usable_cores
from ladderstitch.runtime.device import device_name, resolve_device
from ladderstitch.runtime.process import port_is_free
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.text.engine.rank_handle import launch_process

State = Literal["ok", "warning", "failed"]

SHARED_BYTES = 256 << 20
"""Free shared memory for Ray's object store and for batches on their way to the worker."""
RANK_SHARED_BYTES = 64 << 20
"""Shared memory for the activations that one more rank exchanges with the others."""
SHARED_MEMORY = Path("/dev/shm")
UNLIMITED_BYTES = 1 << 60
"""Limits of cgroups above this are none: version 1 has a large number for that."""
TEMPORARY_BYTES = 1 << 30
"""Free space for Ray's logs."""
OPEN_FILES = 4096
"""Open files per process: every connection is one."""
SOCKET_PATH = 107
"""Longest path of a Unix socket in bytes."""
RAY_PATH = 78
"""Most bytes that follow the temporary directory in the path of one of Ray's sockets."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check; `advice` says what to do unless the state is ok."""

    name: str
    state: State
    detail: str
    advice: str = ""


Check = Callable[[ServerConfig], Iterator[CheckResult]]


def run_checks(config: ServerConfig) -> Iterator[CheckResult]:
    """Yield the results of all checks, in the order in which to fix failures."""
    for check in CHECKS:
        yield from check(config)


def check_python(_: ServerConfig) -> Iterator[CheckResult]:
    """Check the version of Python."""
    passed = sys.version_info >= (3, 11)
    yield _result("python", passed, platform.python_version(), "install Python 3.11 or newer")


def check_packages(_: ServerConfig) -> Iterator[CheckResult]:
    """Check that all required packages are installed in a supported version."""
    problems = []
    for line in metadata.requires("ladderstitch") or []:
        required = Requirement(line)
        if required.marker is not None and not required.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(required.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{required.name} is missing")
            continue
        if not required.specifier.contains(version, prereleases=True):
            problems.append(f"{required.name} {version}, needs {required.specifier}")
    detail = "; ".join(problems) or "all required packages are installed"
    advice = "pip install -c constraints.txt ladderstitch"
    yield _result("packages", not problems, detail, advice)


def check_processors(config: ServerConfig) -> Iterator[CheckResult]:
    """Check that there is a core for every computing thread."""
    cores, ranks = usable_cores(), config.tensor_parallel_size
    threads = resolve_threads(config.threads, ranks=ranks, replicas=config.replicas, cores=cores)
    needed = threads * ranks
    yield _result(
        "processors",
        needed <= cores,
        f"cores: {cores}, computing threads: {needed}",
        "lower `threads` or `tensor_parallel_size`: the threads would share cores",
        failure="warning",
    )


def check_gpu(config: ServerConfig) -> Iterator[CheckResult]:
    """Check that the configured device can be used."""
    try:
        device = resolve_device(config.device)
    except UserError as error:
        advice = "install torch with CUDA (make install TORCH=cuda), or set device: cpu"
        yield CheckResult("gpu", "failed", str(error), advice)
        return
    if device == "cpu" and shutil.which("nvidia-smi"):
        yield CheckResult(
            "gpu",
            "warning",
            "the driver is installed, but torch cannot use it; the CPU is used",
            "install torch with CUDA: make install TORCH=cuda",
        )
    elif device == "cpu":
        yield CheckResult(
            "gpu", "ok", f"none; the CPU is used ({device_name(torch.device('cpu'))})"
        )
    else:
        index = torch.device(device).index or 0
        free, total = torch.cuda.mem_get_info(index)
        detail = f"{torch.cuda.get_device_name(index)}, {free >> 20} of {total >> 20} MiB free"
        yield CheckResult("gpu", "ok", detail)


def check_memory(config: ServerConfig) -> Iterator[CheckResult]:
    """Check the memory that can be used, and the shared memory."""
    weights = sum(path.stat().st_size for path in config.bundle.glob("*.safetensors"))
    available, limited = available_memory(), cgroup_memory()
    usable = available if limited is None else min(available, limited)
    detail = f"{usable >> 20} MiB available, weights of {weights >> 20} MiB"
    if limited is not None and limited < available:
        detail += f"; the container's limit leaves less than the machine's {available >> 20} MiB"
    yield _result(
        "memory",
        usable > 2 * weights + (1 << 30),
        detail,
        "free memory, or raise the container's limit: loading needs about twice the weights plus "
        "1 GiB",
        failure="warning",
    )
    needed = SHARED_BYTES + max(config.tensor_parallel_size - 1, 0) * RANK_SHARED_BYTES
    if sys.platform != "linux":
        return
    room = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    yield _result(
        "shared memory",
        room >= needed,
        f"{room >> 20} MiB in {SHARED_MEMORY}, {needed >> 20} MiB needed",
        f"docker run --shm-size={max(1, -(-needed >> 30))}g; in Kubernetes mount a Memory volume "
        "at /dev/shm",
    )


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Return the bytes that processes can get without swapping, caches included."""
    for line in meminfo.read_text().splitlines() if meminfo.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def cgroup_memory(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int | None:
    """Return the bytes that the cgroups of this process still allow; None without a limit.

    Every cgroup above the own one counts, too. Caches of files can be freed, so that they do not.
    """
    left: list[int] = []
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            names, base = ("memory.max", "memory.current", "inactive_file"), root
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            base = root / "memory"
        else:
            continue
        folder = base / path.lstrip("/")
        while True:
            left += _cgroup_left(folder, *names)
            if folder in (base, folder.parent):
                break
            folder = folder.parent
    return min(left, default=None)


def _cgroup_left(folder: Path, limit: str, usage: str, cache: str) -> list[int]:
    """Return the bytes that one cgroup still allows, or nothing if it has no limit."""
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        statistics = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return []
    if not most.isdigit() or int(most) >= UNLIMITED_BYTES:
        return []
    cached = next((int(s.split()[1]) for s in statistics if s.split()[0] == cache), 0)
    return [max(0, int(most) - used + cached)]


def check_limits(_: ServerConfig) -> Iterator[CheckResult]:
    """Check the limits on open files, temporary files and socket paths."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield _result(
        "open files",
        files >= OPEN_FILES,
        f"at most {files}",
        f"ulimit -n {OPEN_FILES} or more: every connection is an open file",
        failure="warning",
    )
    folder = tempfile.gettempdir()
    room = shutil.disk_usage(folder).free
    yield _result(
        "temporary files",
        room >= TEMPORARY_BYTES,
        f"{room >> 20} MiB in {folder}",
        "free 1 GiB for Ray's logs, or set TMPDIR",
        failure="warning",
    )
    yield _result(
        "socket paths",
        len(folder) + RAY_PATH <= SOCKET_PATH,
        f"TMPDIR is {folder}",
        f"set TMPDIR to a shorter directory: a socket's path has at most {SOCKET_PATH} bytes",
    )


def check_ports(config: ServerConfig) -> Iterator[CheckResult]:
    """Check that every configured port is free."""
    for field, address in config.port_fields():
        port = getattr(config, field)
        if port is not None:
            free = port_is_free(address, port)
            detail = f"{join_address(address, port)} {'is free' if free else 'is taken'}"
            option = f"--{field.replace('_', '-')} 0"
            advice = (
                f"stop the listener (ss -ltnp 'sport = :{port}' shows it), or give serve {option}"
            )
            yield _result(field, free, detail, advice)


def check_bundle(config: ServerConfig) -> Iterator[CheckResult]:
    """Check that the bundle can be loaded."""
    try:
        make_runner(config, ModelRegistry("doctor"), Metrics(), launch_process)
    except UserError as error:
        yield CheckResult("bundle", "failed", str(error), "choose another bundle with --model")
        return
    yield CheckResult("bundle", "ok", str(config.bundle))


def check_access(config: ServerConfig) -> Iterator[CheckResult]:
    """Check TLS certificates and tokens."""
    if config.tls_certificate is None and config.token_file is None:
        yield _result(
            "access",
            not config.insecure_public,
            "open to the whole network" if config.insecure_public else "loopback only",
            "set tls_certificate, tls_key and token_file",
            failure="warning",
        )
        return
    try:
        ListenerConfig.from_config(config, lambda reason: None)
    except UserError as error:
        yield CheckResult("access", "failed", str(error), "fix the file; see examples/tokens.yaml")
        return
    yield CheckResult("access", "ok", "certificate, key and tokens are valid")


def _result(
    name: str, passed: bool, detail: str, advice: str, *, failure: State = "failed"
) -> CheckResult:
    return CheckResult(name, "ok" if passed else failure, detail, "" if passed else advice)


CHECKS: tuple[Check, ...] = (
    check_python,
    check_packages,
    check_processors,
    check_gpu,
    check_memory,
    check_limits,
    check_ports,
    check_bundle,
    check_access,
)

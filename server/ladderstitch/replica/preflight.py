"""Looks at everything that a server needs before it is started, and says what to do about it."""

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

from ladderstitch.api.listener import ListenerConfig
from ladderstitch.bundles import is_language_bundle
from ladderstitch.config import ServerConfig
from ladderstitch.errors import UserError
from ladderstitch.hosting.model_manager import make_runner
from ladderstitch.hosting.registry import ModelRegistry
from ladderstitch.runtime.device import device_name, resolve_device
from ladderstitch.runtime.process import port_is_free
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.text.engine.rank_handle import launch_process
from ladderstitch.vision.bundle import Bundle

State = Literal["ok", "warning", "failed"]

SHARED_BYTES = 256 << 20
"""Ray's object store and the batches that go to the worker."""
TEMPORARY_BYTES = 1 << 30
OPEN_FILES = 4096
SOCKET_PATH = 107
"""Bytes that a Unix socket's path may have; Ray's own part of it is about 60."""
RAY_PATH = 60


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One thing that was looked at; `advice` says what to do unless it is ok."""

    what: str
    state: State
    found: str
    advice: str = ""


Check = Callable[[ServerConfig], Iterator[CheckResult]]


def examine(config: ServerConfig) -> Iterator[CheckResult]:
    """All findings, in the order in which one would mend things."""
    for check in CHECKS:
        yield from check(config)


def check_python(_: ServerConfig) -> Iterator[CheckResult]:
    good = sys.version_info >= (3, 11)
    yield _judged("python", good, platform.python_version(), "ladderstitch needs 3.11 or newer")


def check_packages(_: ServerConfig) -> Iterator[CheckResult]:
    """Installed, and of a version that this package asks for."""
    wrong = []
    for line in metadata.requires("ladderstitch") or []:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} {version}, needs {wanted.specifier}")
    found = "; ".join(wrong) or "all there, of the right versions"
    yield _judged("packages", not wrong, found, "pip install -c constraints.txt ladderstitch")


def check_processors(config: ServerConfig) -> Iterator[CheckResult]:
    cores = len(os.sched_getaffinity(0))
    needed = config.threads * config.tensor_parallel_size
    yield _judged(
        "processors",
        needed <= cores,
        f"{cores} cores, {needed} computing threads",
        "lower `threads` or `ranks`: they would take each other's time",
        worst="warning",
    )


def check_gpu(config: ServerConfig) -> Iterator[CheckResult]:
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
            "a driver is here, but torch cannot use it: running on the CPU",
            "install torch with CUDA: make install TORCH=cuda",
        )
    elif device == "cpu":
        yield CheckResult("gpu", "ok", f"none; the CPU serves ({device_name(torch.device('cpu'))})")
    else:
        index = torch.device(device).index or 0
        free, total = torch.cuda.mem_get_info(index)
        found = f"{torch.cuda.get_device_name(index)}, {free >> 20} of {total >> 20} MiB free"
        yield CheckResult("gpu", "ok", found)


def check_memory(config: ServerConfig) -> Iterator[CheckResult]:
    weights = sum(path.stat().st_size for path in config.bundle.glob("*.safetensors"))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield _judged(
        "memory",
        free > 2 * weights + (1 << 30),
        f"{free >> 20} MiB free, weights of {weights >> 20} MiB",
        "free some: loading needs about twice the weights and 1 GiB",
        worst="warning",
    )
    shared = Path("/dev/shm")
    room = shutil.disk_usage(shared).free if shared.is_dir() else 0
    yield _judged(
        "shared memory",
        room >= SHARED_BYTES,
        f"{room >> 20} MiB in /dev/shm",
        "docker run --shm-size=1g; in Kubernetes a Memory volume at /dev/shm",
    )


def check_limits(_: ServerConfig) -> Iterator[CheckResult]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield _judged(
        "open files",
        files >= OPEN_FILES,
        f"at most {files}",
        f"ulimit -n {OPEN_FILES} or more: every connection is one",
        worst="warning",
    )
    folder = tempfile.gettempdir()
    room = shutil.disk_usage(folder).free
    yield _judged(
        "temporary files",
        room >= TEMPORARY_BYTES,
        f"{room >> 20} MiB in {folder}",
        "Ray logs there: free 1 GiB, or set TMPDIR",
        worst="warning",
    )
    yield _judged(
        "socket paths",
        len(folder) + RAY_PATH <= SOCKET_PATH,
        f"TMPDIR is {folder}",
        f"set TMPDIR to a shorter folder: a socket's path may have {SOCKET_PATH} bytes",
    )


def check_ports(config: ServerConfig) -> Iterator[CheckResult]:
    for field, address in config.listening():
        port = getattr(config, field)
        if port is not None:
            free = port_is_free(address, port)
            found = f"{address}:{port} {'is free' if free else 'is taken'}"
            advice = f"stop what listens there (ss -ltnp 'sport = :{port}'), or set {field}: 0"
            yield _judged(field, free, found, advice)


def check_bundle(config: ServerConfig) -> Iterator[CheckResult]:
    try:
        make_runner(config, ModelRegistry("doctor"), Metrics(), launch_process)
    except UserError as error:
        yield CheckResult("bundle", "failed", str(error), "name another with --model")
        return
    yield CheckResult("bundle", "ok", str(config.bundle))
    if is_language_bundle(config.bundle):
        return
    profile = Bundle.load(config.bundle).latency
    try:
        here = device_name(torch.device(resolve_device(config.device)))
    except UserError:
        return  # the finding on the GPU says so
    measured_on = profile.device if profile is not None else "no machine"
    yield _judged(
        "latency profile",
        measured_on == here,
        f"measured on {measured_on}",
        f"this is {here}; it is scaled at start, `ladderstitch profile` measures",
        worst="warning",
    )


def check_access(config: ServerConfig) -> Iterator[CheckResult]:
    if config.tls_certificate is None and config.token_file is None:
        how = "open to all of the network" if config.insecure_public else "loopback only"
        state: State = "warning" if config.insecure_public else "ok"
        advice = "set tls_certificate, tls_key and token_file" if config.insecure_public else ""
        yield CheckResult("access", state, how, advice)
        return
    try:
        ListenerConfig.of(config, lambda reason: None)
    except UserError as error:
        yield CheckResult("access", "failed", str(error), "mend the file; see examples/tokens.yaml")
        return
    yield CheckResult("access", "ok", "certificate, key and tokens can be read")


def _judged(
    what: str, good: bool, found: str, advice: str, *, worst: State = "failed"
) -> CheckResult:
    return CheckResult(what, "ok" if good else worst, found, "" if good else advice)


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

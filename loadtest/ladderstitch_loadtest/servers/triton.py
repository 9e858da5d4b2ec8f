"""NVIDIA Triton with its Python backend, as a subprocess on this machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc

from ladderstitch.oip import grpc_service_pb2 as oip
from ladderstitch.runtime.process import free_port
from ladderstitch_loadtest.servers.peer_packages import PeerError, tail
from ladderstitch_loadtest.servers.processes import STOP_TIMEOUT_S

READY_TIMEOUT_S = 120.0
POLL_S = 0.2
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
MODEL_READY = "/inference.GRPCInferenceService/ModelReady"


@contextmanager
def triton_server(packages: Path, repository: Path, model: str) -> Iterator[str]:
    """Run Triton on a free port of 127.0.0.1 during the `with` block and yield its address.

    `packages` is the folder of `installed_packages`, and `repository` holds `model`. Raises
    `PeerError` if a shared library is missing, or with the end of the log if the model does not
    become ready.
    """
    home = packages / "pytriton" / "tritonserver"
    environment = _environment(packages)
    _prepare_backend(home, environment)
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    with tempfile.NamedTemporaryFile(prefix="ladderstitch-triton-", suffix=".log") as log:
        process = subprocess.Popen(
            format_command(home, repository, address),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            _wait_until_ready(process, address, model, Path(log.name))
            yield address
        finally:
            _stop(process)


def format_command(home: Path, repository: Path, address: str) -> list[str]:
    """Return Triton's command line: gRPC on `address`, no HTTP and no metrics."""
    host, _, port = address.rpartition(":")
    return [
        str(home / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={home / 'backends'}",
        "--disable-auto-complete-config",
        "--allow-http=false",
        "--allow-metrics=false",
        f"--grpc-address={host}",
        f"--grpc-port={port}",
    ]


def _environment(packages: Path) -> dict[str, str]:
    """Return the environment of Triton: where its packages and the library of Python are."""
    folders = [sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH")]
    return os.environ | {
        "LADDERSTITCH_PEERS": str(packages),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, folders)),
    }


def _prepare_backend(home: Path, environment: dict[str, str]) -> None:
    """Link the program of this version of Python to the place where the backend expects one.

    Raises `PeerError` if the packages have none, or if a shared library is missing.
    """
    program = home / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
    if not program.is_file():
        found = ", ".join(sorted(path.name for path in program.parents[1].glob("*"))) or "none"
        raise PeerError(f"Triton's Python backend: expected one of Python {found}, got {PYTHON}")
    for file in (home / "bin" / "tritonserver", program):
        _check_libraries(file, environment)
    with suppress(FileExistsError):
        (home / "backends" / "python" / program.name).symlink_to(program)


def _check_libraries(program: Path, environment: dict[str, str]) -> None:
    """Raise `PeerError` that names the shared libraries which a program lacks."""
    try:
        output = subprocess.run(
            ["ldd", str(program)], capture_output=True, text=True, env=environment
        ).stdout
    except FileNotFoundError:
        return  # the log of the program names them
    missing = [line.split()[0] for line in output.splitlines() if "not found" in line]
    if missing:
        raise PeerError(
            f"{program.name} on {platform.platform()} lacks {', '.join(missing)}; "
            f"on Debian, `apt-get install libpython{PYTHON}` brings the library of Python"
        )


def _wait_until_ready(
    process: subprocess.Popen[bytes], address: str, model: str, log: Path
) -> None:
    end = time.monotonic() + READY_TIMEOUT_S
    while not _is_ready(address, model):
        status = process.poll()
        if status is not None or time.monotonic() > end:
            reason = f"did not become ready within {READY_TIMEOUT_S:.0f} s"
            if status is not None:
                reason = f"ended with status {status}"
            raise PeerError(f"tritonserver {reason}:\n{tail(log.read_text(errors='replace'))}")
        time.sleep(POLL_S)


def _is_ready(address: str, model: str) -> bool:
    request = oip.ModelReadyRequest(name=model).SerializeToString()
    with grpc.insecure_channel(address) as channel:
        try:
            reply = channel.unary_unary(MODEL_READY)(request, timeout=5)
        except grpc.RpcError:
            return False
    return bool(oip.ModelReadyResponse.FromString(reply).ready)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

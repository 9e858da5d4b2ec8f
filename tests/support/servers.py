"""A real server in its own process, started as users start it, and ways to call it."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image

from ladderstitch.client import Client
from ladderstitch.oip import grpc_service_pb2_grpc
from tests.conftest import make_tiny_bundle

READY = re.compile(
    r"ready after .* gRPC on (\S+), metrics on ([^\s,]+)(?:, OpenAI API on ([^\s,]+))?"
)


@dataclass(frozen=True)
class RunningServer:
    """A server process, its gRPC address, the URLs of its metrics and of its HTTP API, its log."""

    process: subprocess.Popen[str]
    address: str
    metrics: str
    log: Path
    http: str = ""


def start_server(
    bundle: Path, log: Path, *flags: str, environment: dict[str, str] | None = None
) -> RunningServer:
    """Run `ladderstitch serve --no-ray` on free ports, and return when it is ready.

    Options in `flags` override these.
    """
    command = [sys.executable, "-m", "ladderstitch", "serve", "--no-ray", "--bundle", str(bundle)]
    command += ["--port", "0", "--metrics-port", "0", *flags]
    environment = os.environ | {"COLUMNS": "200", "PYTHONUNBUFFERED": "1"} | (environment or {})
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    ready = READY.match(line)
    if ready is None:
        process.kill()
        process.wait()
        raise AssertionError(f"the server said {line!r}; its log: {log.read_text()}")
    return RunningServer(process, ready[1], ready[2], log, ready[3] or "")


def stop_server(server: RunningServer) -> int:
    """Interrupt the server as Ctrl-C does; returns its exit status."""
    server.process.send_signal(signal.SIGINT)
    status = server.process.wait(timeout=300)
    assert server.process.stdout is not None
    server.process.stdout.close()
    return status


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("server")
    running = start_server(make_tiny_bundle(folder / "tiny").path, folder / "log")
    yield running
    assert stop_server(running) == 0


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


@pytest.fixture
def oip(server: RunningServer) -> Iterator[grpc_service_pb2_grpc.GRPCInferenceServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)


def pixels(n: int = 1, seed: int = 0) -> np.ndarray:
    """Return random uint8 pixels [n, 1, 8, 8] for the tiny model."""
    return np.random.default_rng(seed).integers(0, 256, (n, 1, 8, 8), np.uint8)


def picture(size: tuple[int, int] = (8, 8), kind: str = "PNG", mode: str = "L") -> bytes:
    """Return an image file with a fixed pattern; `size` is (width, height)."""
    file = io.BytesIO()
    gradient = np.add.outer(np.arange(size[1]), np.arange(size[0])) * 7 % 256
    Image.fromarray(gradient.astype(np.uint8)).convert(mode).save(file, kind)
    return file.getvalue()

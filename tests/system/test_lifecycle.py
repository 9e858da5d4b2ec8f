"""Start and end of `ladderstitch serve` and `gateway`: addresses, signals, a killed server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from ladderstitch.client import Client, RequestFailed
from ladderstitch.runtime.process import free_port
from tests.conftest import make_tiny_bundle
from tests.support.language_models import write_tiny
from tests.support.servers import RunningServer, pixels, start_server, stop_server

LIMIT_S = 300


def start_command(log: Path, *arguments: object) -> subprocess.Popen[str]:
    """Start a command of the command line; both of its outputs are written to a file."""
    command = [sys.executable, "-m", "ladderstitch", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, text=True, env=environment)


def wait_for_text(log: Path, text: str) -> None:
    """Wait until a log has a text."""
    deadline = time.monotonic() + LIMIT_S
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def is_listening(port: int) -> bool:
    """Return whether a server listens on a port of loopback."""
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def child_of(process: subprocess.Popen[str]) -> int:
    """Return the only child of a supervisor: its server."""
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(child)


@pytest.fixture(scope="module")
def supervised(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("spare")
    running = start_server(make_tiny_bundle(folder / "tiny").path, folder / "log", "--spare")
    yield running
    server = child_of(running.process)
    assert stop_server(running) == 0
    assert not Path(f"/proc/{server}").exists()


def test_spare_restarts_a_killed_server_on_its_ports(supervised: RunningServer) -> None:
    deadline = time.monotonic() + LIMIT_S
    for number in (signal.SIGKILL, signal.SIGSEGV):
        killed = child_of(supervised.process)
        os.kill(killed, number)
        while True:
            try:
                with Client(supervised.address, retry_policy=None) as client:
                    assert client.predict(pixels()).label
                break
            except RequestFailed:
                assert time.monotonic() < deadline, supervised.log.read_text()
                time.sleep(0.02)
        assert child_of(supervised.process) != killed
        with urllib.request.urlopen(supervised.metrics) as page:
            assert page.status == 200
    log = supervised.log.read_text()
    assert f"pid={killed} signal=SIGSEGV" in log


def test_spare_killed_supervisor_ends_its_server(tmp_path: Path) -> None:
    running = start_server(make_tiny_bundle(tmp_path / "t").path, tmp_path / "log", "--spare")
    server = child_of(running.process)
    running.process.kill()
    running.process.wait()
    assert running.process.stdout is not None
    running.process.stdout.close()
    deadline = time.monotonic() + LIMIT_S
    while Path(f"/proc/{server}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert "stopped" in (tmp_path / "log").read_text()


def test_spare_server_that_cannot_start_is_not_restarted(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "tiny").path
    (bundle / "quality.json").unlink()
    process = start_command(tmp_path / "log", "serve", "--no-ray", "--spare", "--bundle", bundle)
    assert process.wait(LIMIT_S) == 2
    log = (tmp_path / "log").read_text()
    assert log.count("error:") == 1
    assert "next one in" not in log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("flags", [(), ("--spare",)])
def test_signal_while_loading_ends_at_once(
    tmp_path: Path, number: signal.Signals, flags: tuple[str, ...]
) -> None:
    if flags and number != signal.SIGTERM:
        pytest.skip("one signal is enough: the supervisor passes all on")
    bundle, log, port = write_tiny(tmp_path / "tiny"), tmp_path / "log", free_port("127.0.0.1")
    slow = ("--tensor-parallel-size", "2", "--emulated-link-ms", "1000")  # loads for minutes
    ports = ("--port", port, "--metrics-port", "0")
    process = start_command(log, "serve", "--no-ray", "--bundle", bundle, *ports, *slow, *flags)
    deadline = time.monotonic() + LIMIT_S
    while not is_listening(port):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(LIMIT_S) == 0
    assert "stopped" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_second_signal_while_draining_ends_at_once(tmp_path: Path) -> None:
    running = start_server(
        write_tiny(tmp_path / "tiny"),
        tmp_path / "log",
        *("--tensor-parallel-size", "2", "--emulated-link-ms", "20", "--drain-s", "3600"),
    )
    with Client(running.address, timeout_s=2 * LIMIT_S) as client:
        stream = client.generate("a prompt", max_tokens=120)
        next(stream)
        running.process.send_signal(signal.SIGTERM)
        wait_for_text(tmp_path / "log", "draining ...")
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(LIMIT_S) == 1
        with pytest.raises(RequestFailed):
            list(stream)
    assert running.process.stdout is not None
    running.process.stdout.close()


@pytest.mark.parametrize("command", ["serve", "gateway"])
def test_port_taken_at_the_same_time_is_one_line(tmp_path: Path, command: str) -> None:
    port = free_port("127.0.0.1")
    bundle = make_tiny_bundle(tmp_path / "tiny").path
    own = ("--no-ray", "--bundle", bundle) if command == "serve" else ("--replica", "127.0.0.1:9")
    logs = [tmp_path / f"log-{n}" for n in range(3)]
    processes = [
        start_command(log, command, *own, "--port", port, "--metrics-port", "0") for log in logs
    ]
    deadline = time.monotonic() + LIMIT_S
    while sum(process.poll() is None for process in processes) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for process, log in zip(processes, logs, strict=True):
        if process.poll() is None:
            wait_for_text(log, "ready")
            process.send_signal(signal.SIGTERM)
            assert process.wait(LIMIT_S) == 0
        else:
            lines = [line for line in log.read_text().splitlines() if "warming up" not in line]
            assert process.returncode == 2
            assert len([line for line in lines if line.strip()]) == 1, lines
            assert f"127.0.0.1:{port}" in lines[0]


def test_ipv6_server_and_gateway_answer(tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "tiny")
    running = start_server(bundle, tmp_path / "log", "--host", "[::1]", "--http-port", "0")
    assert running.address.startswith("[::1]:")
    port = free_port("::1")
    log = tmp_path / "gateway"
    arguments = ("--host", "::1", "--port", port, "--metrics-port", "0")
    gateway = start_command(log, "gateway", *arguments, "--replica", running.address)
    wait_for_text(log, "is serving")
    for address in (running.address, f"[::1]:{port}"):
        with Client(address) as client:
            assert list(client.generate("a prompt", max_tokens=2))
    for url in (running.metrics, f"{running.http}/models"):
        assert url.startswith("http://[::1]:")
        with urllib.request.urlopen(url) as page:
            assert page.status == 200
    gateway.send_signal(signal.SIGTERM)
    assert gateway.wait(LIMIT_S) == 0
    assert stop_server(running) == 0

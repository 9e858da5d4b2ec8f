"""`ladderstitch serve` and `predict` as a user runs them, on Ray and without."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ladderstitch.client import Client, RequestFailed
from ladderstitch_loadtest.faults.fuzz_runner import process_tree
from tests.conftest import make_tiny_bundle
from tests.support.language_models import write_tiny
from tests.support.servers import RunningServer, picture, pixels, start_server, stop_server


def ladderstitch(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ladderstitch", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)


def eventually(check: Callable[[], bool], within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[RunningServer]:
    """A server of the test's own, without Ray."""
    running = start_server(make_tiny_bundle(tmp_path / "tiny").path, tmp_path / "log")
    yield running
    if running.process.poll() is None:
        assert stop_server(running) == 0


def test_predict_shows_what_the_answer_cost(alone: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "b.jpg").write_bytes(picture((20, 30), "JPEG"))
    files = [tmp_path / "a.png", tmp_path / "b.jpg"]
    done = ladderstitch("predict", *files, "--budget", "800ms", "--address", alone.address)
    assert done.returncode == 0, done.stderr
    assert re.search(r"a\.png.*(ankle|bag|coat|dress).*0\.6600.*800\.0 ms met", done.stdout)
    assert "b.jpg" in done.stdout

    refused = ladderstitch(
        "predict", files[0], "--budget", "10us", "--hard", "--address", alone.address
    )
    assert refused.returncode == 1
    assert "BUDGET_INFEASIBLE" in refused.stderr
    assert "the smallest budget is" in refused.stderr


def test_models_and_schedule_from_the_command_line(alone: RunningServer) -> None:
    listed = ladderstitch("models", "--address", alone.address)
    assert "tiny version 1" in listed.stdout
    changed = ladderstitch("schedule", "--pin", 3, "--address", alone.address)
    assert "pinned_variant: 3" in changed.stdout
    wrong = ladderstitch("schedule", "--pin", 999, "--address", alone.address)
    assert wrong.returncode == 1
    assert "pinned_variant: expected a variant" in wrong.stderr


def test_no_server_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    done = ladderstitch("predict", tmp_path / "a.png", "--address", "127.0.0.1:9")
    assert done.returncode == 1
    assert "no server at 127.0.0.1:9; start one with `ladderstitch serve`" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "absent.png"], "No such file"),
        (["predict", __file__, "--budget", "fast"], "budget: expected e.g. 800us, 5ms or 0.5s"),
        (["serve", "--model", "nowhere"], "no bundle 'nowhere'"),
        (["serve", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_exit_with_2_and_a_reason(arguments: list[str], message: str) -> None:
    done = ladderstitch(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_named(alone: RunningServer, tmp_path: Path) -> None:
    port = alone.address.split(":")[1]
    done = ladderstitch("serve", "--no-ray", "--bundle", tmp_path / "tiny", "--port", port)
    assert done.returncode == 2
    assert f"port: 127.0.0.1:{port} is taken" in done.stderr


def test_a_killed_worker_costs_no_request(alone: RunningServer) -> None:
    _, worker = process_tree(alone.process.pid)
    with Client(alone.address) as client:
        client.predict(pixels())
        os.kill(worker, signal.SIGKILL)
        for n in range(20):
            assert client.predict(pixels(seed=n)).label
    assert worker not in process_tree(alone.process.pid)


def test_a_server_without_a_parent_leaves_no_worker(alone: RunningServer) -> None:
    _, worker = process_tree(alone.process.pid)
    alone.process.kill()
    alone.process.wait()
    assert alone.process.stdout is not None
    alone.process.stdout.close()
    eventually(lambda: not Path(f"/proc/{worker}").exists())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served_on_ray(bundle: Path, folder: Path, *flags: str) -> Iterator[tuple[RunningServer, Path]]:
    """The default: under Ray Serve, on fixed ports, in a temporary directory to look into.

    Ends with Ctrl-C, which must leave no process and no file behind.
    """
    temporary = Path(tempfile.mkdtemp(prefix="lt", dir="/tmp"))  # short: Ray's sockets live below
    running = start_server(
        bundle,
        folder / "log",
        *flags,
        "--ray",
        "--port",
        str(free_port()),
        "--metrics-port",
        str(free_port()),
        environment={"TMPDIR": str(temporary)},
    )
    yield running, temporary
    processes = process_tree(running.process.pid)
    assert len(processes) > 4
    assert stop_server(running) == 0
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes))
    assert list(temporary.iterdir()) == []
    temporary.rmdir()


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, Path]]:
    folder = tmp_path_factory.mktemp("ray")
    with served_on_ray(make_tiny_bundle(folder / "tiny").path, folder) as running:
        yield running


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def of_ray(server: RunningServer, part: str) -> tuple[int, str]:
    """Process id and command line of one of the processes below a server."""
    lines = {pid: command_line(pid) for pid in process_tree(server.process.pid)}
    return next((pid, line) for pid, line in lines.items() if part in line)


def test_on_ray_it_answers_and_reports(on_ray: tuple[RunningServer, Path]) -> None:
    server, _ = on_ray
    with Client(server.address) as client:
        answer = client.predict(pixels(), budget_s=2.0)
    assert answer.quality == 0.66
    with urllib.request.urlopen(server.metrics) as page:
        text = page.read().decode()
    assert 'ladderstitch_requests_total{code="OK",model="tiny",variant="16"}' in text


def test_on_ray_token_authentication_is_on(on_ray: tuple[RunningServer, Path]) -> None:
    """Ray's control plane listens on all interfaces: without its token nobody gets in."""
    server, temporary = on_ray
    (folder,) = temporary.iterdir()
    token = folder / "token"
    assert token.stat().st_mode & 0o077 == 0
    _, line = of_ray(server, "gcs_server")
    port = re.search(r"--gcs_server_port=(\d+)", line)
    if port is None or port[1] == "0":
        port = re.search(r"--gcs-address=\S+:(\d+)", of_ray(server, "raylet/raylet ")[1])
    assert port, line

    def join(secret: str) -> subprocess.CompletedProcess[str]:
        code = f"import ray; ray.init('127.0.0.1:{port[1]}', logging_level='error')"
        environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secret}
        return subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=500,
            env=environment,
        )

    stranger = join("0" * 64)
    assert stranger.returncode != 0
    assert "auth" in stranger.stderr.lower()


def test_on_ray_a_replaced_replica_reads_the_live_policy(
    on_ray: tuple[RunningServer, Path],
) -> None:
    server, _ = on_ray
    with Client(server.address) as client:
        client.update_scheduling(pinned_variant=7)
    replica, _ = of_ray(server, "ServeReplica")
    os.kill(replica, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{replica}").exists())

    def answers() -> bool:
        with Client(server.address) as client:
            try:
                return client.predict(pixels(), timeout_s=1.0).variant == 7
            except RequestFailed:
                return False

    eventually(answers, within_s=60.0)
    with Client(server.address) as client:
        assert client.get_scheduling().pinned_variant == 7


def test_on_ray_ranks_are_actors_and_a_killed_one_costs_no_token(tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "tiny")
    with (
        served_on_ray(bundle, tmp_path, "--tensor-parallel-size", "2") as (server, _),
        Client(server.address) as client,
    ):
        wanted = [piece.token for piece in client.generate("a prompt", max_tokens=30)]
        stream = client.generate("a prompt", max_tokens=30)
        got = [next(stream).token]
        rank, _ = of_ray(server, "RankActor")
        os.kill(rank, signal.SIGKILL)
        got += [piece.token for piece in stream]
    assert got == wanted

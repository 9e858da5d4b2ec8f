"""`ladderstitch serve` and `predict` as users run them, on Ray and without it."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ladderstitch.client import Client, RequestFailed
from ladderstitch.runtime.process import free_port
from ladderstitch.text.bundle import TextBundle
from ladderstitch.training.vision.quantize import quantize
from ladderstitch.vision.bundle import VisionBundle, write_table
from ladderstitch_loadtest.faults.fuzz_runner import process_tree
from tests.conftest import make_tiny_bundle
from tests.support.language_models import greedy, write_tiny
from tests.support.servers import RunningServer, picture, pixels, start_server, stop_server
from tests.training.vision.test_quantize import random_images


def ladderstitch(*arguments: object, columns: int = 200) -> subprocess.CompletedProcess[str]:
    """Run a command of the command line to its end."""
    command = [sys.executable, "-m", "ladderstitch", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": str(columns), "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until the condition is true; fails after 300 s."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.05)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    """Start a server without Ray for one test."""
    running = start_server(make_tiny_bundle(tmp_path / "tiny").path, tmp_path / "log")
    yield running
    if running.process.poll() is None:
        assert stop_server(running) == 0


def test_predict_prints_the_cost_of_each_answer(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "b.jpg").write_bytes(picture((20, 30), "JPEG"))
    files = [tmp_path / "a.png", tmp_path / "b.jpg"]
    done = ladderstitch("predict", *files, "--budget", "800ms", "--address", server.address)
    assert done.returncode == 0, done.stderr
    names, *rows = (line.split("\t") for line in done.stdout.splitlines())
    assert [row[0] for row in rows] == ["a.png", "b.jpg"]
    first = dict(zip(names, rows[0], strict=True))
    assert first["label"] in ("ankle", "bag", "coat", "dress")
    assert (first["quality"], first["budget_s"], first["budget_met"]) == ("0.66", "0.8", "true")
    assert "missed" not in done.stderr

    late = ladderstitch("predict", files[0], "--budget", "1us", "--address", server.address)
    assert late.returncode == 0, late.stderr
    said = " ".join(late.stderr.split())
    assert re.search(r"1 of 1 budgets were missed; an idle server keeps [\d.]+ ms with", said)

    required = ["--budget", "1us", "--require-met", "--address", server.address]
    assert ladderstitch("predict", files[0], *required).returncode == 3
    rejected = ladderstitch(
        "predict", files[0], "--budget", "10us", "--hard", "--address", server.address
    )
    assert rejected.returncode == 1
    assert "BUDGET_INFEASIBLE" in rejected.stderr
    assert "the expected time of the fastest allowed variant" in rejected.stderr
    assert "try a budget of" in rejected.stderr


def on_a_terminal(*arguments: object, columns: int) -> str:
    """Return what a command prints on a terminal of some width, without its colours."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    command = [sys.executable, "-m", "ladderstitch", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "dumb"}
    with open(ours, "rb", buffering=0) as screen, open(theirs, "wb", buffering=0) as terminal:
        done = subprocess.run(command, stdout=terminal, timeout=500, env=environment)
        printed: bytes = screen.readall() or b""
    assert done.returncode == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", printed.decode())


def test_predict_and_models_tables_fit_80_columns(server: RunningServer, tmp_path: Path) -> None:
    image = tmp_path / "a-long-name-00.png"
    image.write_bytes(picture())
    for command in (["predict", image, "--budget", "800ms"], ["models"]):
        shown = on_a_terminal(*command, "--address", server.address, columns=80)
        assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
        assert "…" not in shown
    rows = [line.split() for line in shown.splitlines()]
    assert ["variant", "name", "quality", "expected", "planned"] in rows
    assert sum(row[1:2] == ["anchor-0"] and "0.5000" in row for row in rows) == 1
    assert rows[0][:3] == ["tiny", "version", "1:"]


def test_commands_that_call_a_server_print_json(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "b.png").write_bytes(b"no picture")

    def read(*arguments: object, status: int = 0) -> Any:
        done = ladderstitch(*arguments, "--json", "--address", server.address)
        assert done.returncode == status, done.stderr
        return json.loads(done.stdout)

    files = (tmp_path / "a.png", tmp_path / "b.png")
    document = read("predict", *files, "--budget", "800ms", status=1)
    (answer,), (failure,) = document["answers"], document["failures"]
    assert answer["file"] == "a.png"
    assert answer["budget_met"] is True
    assert answer["top"][0][0]["label"] == answer["label"]
    assert 0 < answer["compute_s"] <= answer["total_s"] <= answer["budget_s"] == 0.8
    assert (failure["file"], failure["code"]) == ("b.png", "INVALID_ARGUMENT")
    assert "BytesIO" not in failure["message"]
    free = read("predict", files[0])["answers"][0]
    assert free["budget_s"] is free["budget_met"] is None
    (model,) = read("models")["models"]
    assert (model["name"], model["kind"]) == ("tiny", "image")
    assert {"variant", "name", "quality", "planned_s"} <= model["variants"][0].keys()
    assert read("schedule")["settings"]["policy"] == "adaptive"
    assert read("health") == {"service": "", "state": "SERVING"}


def test_models_and_schedule_show_and_change_a_server(server: RunningServer) -> None:
    listed = ladderstitch("models", "--address", server.address)
    assert listed.stdout.splitlines()[1].startswith("tiny\t0\tanchor-0\t")
    changed = ladderstitch("schedule", "--pin", 3, "--address", server.address)
    assert "pinned_variant\t3" in changed.stdout
    wrong = ladderstitch("schedule", "--pin", 999, "--address", server.address)
    assert wrong.returncode == 1
    assert "pinned_variant: expected a variant" in wrong.stderr


def test_generate_local_prints_the_greedy_answer(tmp_path: Path) -> None:
    bundle = TextBundle.load(write_tiny(tmp_path / "tiny"))
    done = ladderstitch(
        "generate", "a prompt", "--local", "--model", bundle.path, "--max-tokens", 8
    )
    assert done.returncode == 0, done.stderr
    expected = bundle.tokenizer().decode(greedy(bundle, "a prompt", 8))
    assert done.stdout == f"{expected}\n"
    assert "tokens/s" in done.stderr


def test_predict_without_a_server_prints_advice(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    done = ladderstitch("predict", tmp_path / "a.png", "--address", "127.0.0.1:9")
    assert done.returncode == 1
    assert "no server at 127.0.0.1:9; start one with `ladderstitch serve`" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "absent.png"], "No such file"),
        (["predict", __file__, "--budget", "fast"], "budget: expected a number with a unit"),
        (["serve", "--model", "nowhere"], "expected a bundle, got 'nowhere'"),
        (["serve", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_invalid_arguments_exit_with_2_and_a_reason(arguments: list[str], message: str) -> None:
    done = ladderstitch(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_serve_taken_ports_are_all_named_in_the_error(
    server: RunningServer, tmp_path: Path
) -> None:
    port = server.address.split(":")[1]
    taken = ("--port", port, "--metrics-port", port)
    done = ladderstitch("serve", "--no-ray", "--bundle", tmp_path / "tiny", *taken)
    assert done.returncode == 2
    error = " ".join(done.stderr.split())
    for field in ("port", "metrics_port"):
        assert f"{field}: expected a free port, got 127.0.0.1:{port}, which is taken" in error
    assert "--port 0 --metrics-port 0 picks free ports" in error


@pytest.fixture
def torch_server(tmp_path: Path) -> Iterator[RunningServer]:
    """Start a server without Ray that computes in a worker process."""
    bundle = make_tiny_bundle(tmp_path / "tiny").path
    running = start_server(bundle, tmp_path / "log", "--runtime", "torch")
    yield running
    if running.process.poll() is None:
        assert stop_server(running) == 0


def test_serve_killed_worker_loses_no_request(torch_server: RunningServer) -> None:
    server = torch_server
    _, worker = process_tree(server.process.pid)
    with Client(server.address) as client:
        client.predict(pixels())
        os.kill(worker, signal.SIGKILL)
        for n in range(20):
            assert client.predict(pixels(seed=n)).label
    assert worker not in process_tree(server.process.pid)


def test_torch_runtime_describes_only_the_variants_that_it_serves(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "tiny")
    quantize(bundle, random_images(bundle, 8, seed=0), lambda *_: None)
    bundle = VisionBundle.load(bundle.path)
    assert bundle.quality is not None
    exact = dict(bundle.quality.variants)
    for variant in bundle.manifest.variants():
        bundle.quality.variants.setdefault(variant.id, next(iter(exact.values())))
    write_table(bundle.path / "quality.json", bundle.quality)
    server = start_server(bundle.path, tmp_path / "log", "--runtime", "torch")
    try:
        with Client(server.address) as client:
            described = {variant.id for variant in client.get_model().variants}
            assert described == exact.keys() < bundle.quality.variants.keys()
    finally:
        assert stop_server(server) == 0


def test_serve_killed_server_leaves_no_worker(torch_server: RunningServer) -> None:
    server = torch_server
    _, worker = process_tree(server.process.pid)
    server.process.kill()
    server.process.wait()
    assert server.process.stdout is not None
    server.process.stdout.close()
    wait_until(lambda: not Path(f"/proc/{worker}").exists())


@contextmanager
def served_on_ray(bundle: Path, folder: Path, *flags: str) -> Iterator[tuple[RunningServer, Path]]:
    """Run a server on Ray Serve, on fixed ports; yields it and the temporary directory of Ray.

    Ctrl-C stops it, and must leave no process and no file.
    """
    temporary = Path(tempfile.mkdtemp(prefix="lt", dir="/tmp"))  # short for Ray
    running = start_server(
        bundle,
        folder / "log",
        *flags,
        "--ray",
        "--port",
        str(free_port("127.0.0.1")),
        "--metrics-port",
        str(free_port("127.0.0.1")),
        environment={"TMPDIR": str(temporary)},
    )
    yield running, temporary
    processes = process_tree(running.process.pid)
    assert len(processes) > 4
    assert stop_server(running) == 0
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes))
    assert list(temporary.iterdir()) == []
    temporary.rmdir()


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, Path]]:
    folder = tmp_path_factory.mktemp("ray")
    with served_on_ray(make_tiny_bundle(folder / "tiny").path, folder) as running:
        yield running


def command_line(pid: int) -> str:
    """Return the command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def find_process(server: RunningServer, part: str) -> tuple[int, str]:
    """Return id and command line of the process below a server whose command line has `part`."""
    lines = {pid: command_line(pid) for pid in process_tree(server.process.pid)}
    return next((pid, line) for pid, line in lines.items() if part in line)


def test_on_ray_server_answers_and_counts_requests(on_ray: tuple[RunningServer, Path]) -> None:
    server, _ = on_ray
    with Client(server.address) as client:
        answer = client.predict(pixels(), budget_s=2.0)
    assert answer.quality == 0.66
    with urllib.request.urlopen(server.metrics) as page:
        text = page.read().decode()
    assert 'ladderstitch_requests_total{code="OK",model="tiny",variant="16"}' in text


def test_on_ray_control_plane_rejects_another_token(on_ray: tuple[RunningServer, Path]) -> None:
    """Ray's control plane listens on loopback only, and requires its token there, too."""
    server, temporary = on_ray
    (folder,) = temporary.iterdir()
    token = folder / "token"
    assert token.stat().st_mode & 0o077 == 0
    _, line = find_process(server, "gcs_server")
    port = re.search(r"--gcs_server_port=(\d+)", line)
    if port is None or port[1] == "0":
        port = re.search(r"--gcs-address=\S+:(\d+)", find_process(server, "raylet/raylet ")[1])
    assert port, line

    def join(secret: str) -> subprocess.CompletedProcess[str]:
        client = f"GcsClient(address='127.0.0.1:{port[1]}')"
        code = f"from ray._raylet import GcsClient; print({client}.get_all_node_info())"
        environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secret}
        return subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=500,
            env=environment,
        )

    joined = join("0" * 64)
    assert joined.returncode != 0
    assert "auth" in joined.stderr.lower()
    assert join(token.read_text().strip()).returncode == 0


def test_on_ray_replaced_replica_has_the_active_settings(
    on_ray: tuple[RunningServer, Path],
) -> None:
    server, _ = on_ray
    with Client(server.address) as client:
        client.update_scheduling(pinned_variant=7)
    replica, _ = find_process(server, "ServeReplica")
    os.kill(replica, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{replica}").exists())

    def answers_with_pinned_variant() -> bool:
        with Client(server.address) as client:
            try:
                return client.predict(pixels(), timeout_s=1.0).variant == 7
            except RequestFailed:
                return False

    wait_until(answers_with_pinned_variant)
    with Client(server.address) as client:
        assert client.get_scheduling().pinned_variant == 7


def test_on_ray_text_server_survives_killed_rank_and_replica(tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "tiny")
    with (
        served_on_ray(bundle, tmp_path, "--tensor-parallel-size", "2") as (server, temporary),
        Client(server.address) as client,
    ):
        expected = [chunk.token for chunk in client.generate("a prompt", max_tokens=30)]
        stream = client.generate("a prompt", max_tokens=30)
        got = [next(stream).token]
        rank, _ = find_process(server, "RankActor")
        os.kill(rank, signal.SIGKILL)
        got += [chunk.token for chunk in stream]
        assert got == expected

        client.update_scheduling(pinned_variant=0)
        replica, _ = find_process(server, "ServeReplica")
        (sockets,) = temporary.glob("lsr-*")
        os.kill(replica, signal.SIGKILL)  # its placement group ends with it
        wait_until(lambda: not Path(f"/proc/{replica}").exists())
        shutil.rmtree(sockets)  # which a killed process leaves

        def answers_again() -> bool:
            try:
                chunks = list(client.generate("a prompt", max_tokens=30, timeout_s=20.0))
            except RequestFailed:
                return False
            return [chunk.token for chunk in chunks] == expected

        wait_until(answers_again)
        assert client.get_scheduling().pinned_variant == 0

"""Rules and dashboard, checked by promtool and live with Prometheus and real servers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ladderstitch.client import Client, Credentials, RequestFailed
from ladderstitch.gateway.metrics import GatewayMetrics
from ladderstitch.runtime.process import free_port
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch_loadtest.faults.fuzz_runner import process_tree
from ladderstitch_loadtest.servers.process_supervisor import SupervisedProcess
from tests.conftest import make_tiny_bundle
from tests.deploy.conftest import tool
from tests.support.language_models import write_tiny
from tests.support.servers import RunningServer, pixels, start_server, stop_server
from tests.system.deploy.monitoring import (
    DASHBOARD,
    RULES,
    TEMPLATE,
    Inbox,
    Prometheus,
    alerts,
    draw,
    queries,
    running,
    shorten_intervals,
    wait_until_empty,
)

ROOT = Path(__file__).resolve().parents[3]
USER, ADMIN = "user-secret-0123456789", "admin-secret-0123456789"


def test_rules_pass_promtool() -> None:
    subprocess.run([tool("promtool"), "check", "rules", str(RULES)], check=True)


def test_every_alert_fires_only_in_its_scenario() -> None:
    cases = ROOT / "deploy/monitoring/rules_test.yaml"
    subprocess.run([tool("promtool"), "test", "rules", str(cases)], check=True)
    tests = yaml.safe_load(cases.read_text())["tests"]
    fired = {
        case["alertname"]
        for test in tests
        for case in test.get("alert_rule_test", ())
        if case["exp_alerts"]
    }
    assert fired == alerts()


def test_dashboard_shows_every_metric() -> None:
    subprocess.run([sys.executable, "scripts/dashboard.py", "--check"], check=True, cwd=ROOT)
    shown = " ".join(queries())
    for metrics in (Metrics(), GatewayMetrics()):
        for metric in metrics.registry.collect():
            assert metric.name in shown


def test_every_panel_of_the_dashboard_is_described() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    charts = [panel for panel in panels if panel["type"] != "row"]
    assert len(charts) > 40
    assert not [chart["title"] for chart in charts if not chart["description"].endswith(".")]


def test_chart_contains_the_rules(helm: str) -> None:
    command = [helm, "template", "x", str(ROOT / "deploy/chart"), "-s", "templates/monitoring.yaml"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (rules,) = (m for m in yaml.safe_load_all(text) if m["kind"] == "PrometheusRule")
    assert rules["spec"]["groups"] == yaml.safe_load(RULES.read_text())["groups"]


@pytest.fixture(scope="module")
def inbox() -> Iterator[Inbox]:
    inbox = Inbox()
    yield inbox
    inbox.close()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokens") / "tokens.yaml"
    file.write_text(
        f"tokens: [{{name: u, token: {USER}}}, "
        f"{{name: a, token: {ADMIN}, scopes: [inference, admin]}}]"
    )
    return file


@pytest.fixture(scope="module")
def image_server(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Iterator[RunningServer]:
    """Start a server with limits so low that each alert can be provoked."""
    folder = tmp_path_factory.mktemp("image")
    config = folder / "serve.yaml"
    config.write_text("runtime: torch\nmax_batch_size: 8\nscheduling: {queue_limit_requests: 8}\n")
    flags = ["--config", str(config), "--token-file", str(tokens)]
    server = start_server(make_tiny_bundle(folder / "tiny").path, folder / "log", *flags)
    yield server
    if server.process.poll() is None:
        assert stop_server(server) == 0


@pytest.fixture(scope="module")
def text_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("text")
    manifest = write_tiny(folder / "text") / "model.yaml"
    manifest.write_text(yaml.safe_dump(yaml.safe_load(manifest.read_text()) | {"name": "text"}))
    server = start_server(manifest.parent, folder / "log")
    yield server
    if server.process.poll() is None:
        assert stop_server(server) == 0


@pytest.fixture(scope="module")
def gateway(
    tmp_path_factory: pytest.TempPathFactory,
    tokens: Path,
    image_server: RunningServer,
    text_server: RunningServer,
) -> Iterator[SupervisedProcess]:
    """Start a gateway in front of replicas with different models, so that it retries."""
    own = tmp_path_factory.mktemp("gateway") / "token"
    own.write_text(USER)
    process = SupervisedProcess(
        "gateway",
        "--replica",
        image_server.address,
        "--replica",
        text_server.address,
        "--token-file",
        str(tokens),
        "--replica-token-file",
        str(own),
        "--port",
        "0",
        "--metrics-port",
        "0",
        restart=False,
    )
    process.start()
    process.wait_until_ready()
    yield process
    assert process.stop() == 0


@pytest.fixture(scope="module")
def prometheus(
    tmp_path_factory: pytest.TempPathFactory,
    inbox: Inbox,
    image_server: RunningServer,
    text_server: RunningServer,
    gateway: SupervisedProcess,
) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    binary, alertmanager = tool("prometheus"), TEMPLATE.is_file()
    ports = (
        free_port("127.0.0.1"),
        free_port("127.0.0.1") if alertmanager else inbox.server.server_port,
    )
    (folder / "rules.yaml").write_text(shorten_intervals(RULES.read_text()))
    pages = (image_server.metrics, text_server.metrics, gateway.metrics)
    targets = [urllib.parse.urlparse(page).netloc for page in pages]
    configuration = {
        "global": {"scrape_interval": "500ms", "evaluation_interval": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [{"job_name": "ladderstitch", "static_configs": [{"targets": targets}]}],
        "alerting": {
            "alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{ports[1]}"]}]}]
        },
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    webhook = f"http://127.0.0.1:{inbox.server.server_port}/"
    routing = {
        "route": {
            "receiver": "test",
            "group_wait": "0s",
            "group_interval": "1s",
            "group_by": ["alertname"],
        },
        "receivers": [{"name": "test", "webhook_configs": [{"url": webhook}]}],
    }
    (folder / "alertmanager.yaml").write_text(yaml.safe_dump(routing))
    client = Prometheus(ports[0])
    command = [binary, f"--config.file={folder / 'prometheus.yaml'}"]
    command += [f"--storage.tsdb.path={folder / 'p'}", f"--web.listen-address=127.0.0.1:{ports[0]}"]
    alertmanager_command = [
        tool("prometheus-alertmanager"),
        f"--config.file={folder / 'alertmanager.yaml'}",
    ]
    alertmanager_command += [
        f"--storage.path={folder / 'a'}",
        f"--web.listen-address=127.0.0.1:{ports[1]}",
    ]
    with contextlib.ExitStack() as processes:
        processes.enter_context(running(command, folder / "p.log"))
        if alertmanager:
            alertmanager_command.append("--cluster.listen-address=")
            processes.enter_context(running(alertmanager_command, folder / "a.log"))
        wait_until_empty(lambda: not client.ready())
        yield client


@contextlib.contextmanager
def under_load(
    images: RunningServer, text: RunningServer, gateway: SupervisedProcess
) -> Iterator[None]:
    """Run callers that are on time, late, rejected, denied, or read text; some by the gateway."""
    done = threading.Event()

    def call(token: str, address: str = images.address, **options: Any) -> None:
        with Client(address, credentials=Credentials(token=token)) as client:
            while not done.wait(0.01):
                with contextlib.suppress(RequestFailed):
                    client.predict(pixels(), **options)

    def read(address: str) -> None:
        with Client(address, credentials=Credentials(token=USER)) as client:
            while not done.wait(0.05):
                for _ in client.generate("a prompt", model="text", max_tokens=5, budget_s=5.0):
                    pass

    callers: list[dict[str, Any]] = [{"token": USER, "budget_s": 1e-6}] * 12
    for address in (images.address, gateway.address):
        callers.append({"token": USER, "budget_s": 5.0, "model": "tiny", "address": address})
        callers.append({"token": "an-unknown-0123456789", "address": address})
    threads = [threading.Thread(target=call, kwargs=kwargs) for kwargs in callers]
    readers = (text.address, gateway.address)
    threads += [threading.Thread(target=read, args=(address,)) for address in readers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


def worker_of(server: RunningServer) -> int:
    """Wait for the server's worker; return its process id."""
    wait_until_empty(lambda: not process_tree(server.process.pid)[1:])
    return process_tree(server.process.pid)[1]


def is_answering(server: RunningServer) -> bool:
    """Return whether the server answers a request."""
    with Client(server.address, credentials=Credentials(token=ADMIN)) as client:
        try:
            return bool(client.predict(pixels()).label)
        except RequestFailed:
            return False


def pause(pid: int, seconds: float) -> None:
    """Stop a process for some seconds."""
    os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(pid, signal.SIGCONT)


def test_metrics_pass_promtool(
    image_server: RunningServer, text_server: RunningServer, gateway: SupervisedProcess
) -> None:
    for address in (image_server.metrics, text_server.metrics, f"{gateway.metrics}/metrics"):
        with urllib.request.urlopen(address) as page:
            text = page.read()
        done = subprocess.run(
            [tool("promtool"), "check", "metrics"], input=text, capture_output=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_live_queries_have_data_and_alerts_are_delivered(
    prometheus: Prometheus,
    inbox: Inbox,
    image_server: RunningServer,
    text_server: RunningServer,
    gateway: SupervisedProcess,
) -> None:
    admin = Credentials(token=ADMIN)
    with under_load(image_server, text_server, gateway):
        without_ray = [query for query in queries() if not query.startswith("ray_")]
        assert len(without_ray) > 30

        def empty() -> list[str]:
            return [query for query in without_ray if not prometheus.query(query)]

        os.kill(worker_of(image_server), signal.SIGKILL)  # restarts have a panel
        wait_until_empty(empty)
        with Client(image_server.address, credentials=admin) as client:
            client.update_scheduling(pinned_variant=0)  # the fastest
        pause(worker_of(image_server), 1.5)  # queued requests become late

        def stutter() -> set[str]:
            """Let some batches take a hundred times their prediction; return the missing alert."""
            pause(worker_of(image_server), 0.15)
            return {"LadderstitchLatencyModelWrong"} - inbox.names

        wait_until_empty(stutter)

        def kill_worker() -> set[str]:
            """Kill the worker, wait for the next one; return the missing alert."""
            os.kill(worker_of(image_server), signal.SIGKILL)
            wait_until_empty(lambda: not is_answering(image_server))
            return {"LadderstitchEngineRestarts"} - inbox.names

        wait_until_empty(kill_worker)
        after_the_end = {
            "LadderstitchNotReady",
            "LadderstitchNoData",
            "LadderstitchNoReplicaServes",
        }
        during_the_run = alerts() - after_the_end
        wait_until_empty(lambda: during_the_run - inbox.names)
        if path := os.environ.get("LADDERSTITCH_PANELS"):
            draw(prometheus, Path(path))
    with Client(image_server.address, credentials=admin) as client:
        client.drain()
    wait_until_empty(lambda: {"LadderstitchNotReady"} - inbox.names)
    assert stop_server(image_server) == 0
    assert stop_server(text_server) == 0
    wait_until_empty(lambda: alerts() - inbox.names)

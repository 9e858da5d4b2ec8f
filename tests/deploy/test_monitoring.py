"""Rules and dashboard before promtool, and live: Prometheus, Alertmanager, real servers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import yaml

from ladderstitch.client import Access, Client, RequestFailed
from ladderstitch.metrics import Metrics
from ladderstitch_loadtest.malformed import process_tree
from tests.conftest import make_tiny_bundle
from tests.deploy.conftest import tool
from tests.language.conftest import write_tiny
from tests.service.conftest import RunningServer, pixels, start_server, stop_server

mpl.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy/chart/files/rules.yaml"
DASHBOARD = ROOT / "deploy/monitoring/dashboard.json"
TEMPLATE = Path("/usr/share/prometheus/alertmanager/default.tmpl")
"""Without it Debian's Alertmanager ends; Prometheus then posts to the inbox itself."""
USER, ADMIN = "user-secret-0123456789", "admin-secret-0123456789"


def alerts() -> set[str]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}


def queries() -> dict[str, str]:
    """Expression, with Grafana's variables filled in -> title of its panel."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return {
        filled(target["expr"]): panel["title"]
        for panel in panels
        for target in panel.get("targets", ())
    }


def filled(expression: str) -> str:
    return expression.replace("$model", ".*").replace("$__rate_interval", "5s")


def test_rules_are_what_promtool_takes() -> None:
    subprocess.run([tool("promtool"), "check", "rules", str(RULES)], check=True)


def test_every_alert_fires_in_its_scenario_and_rests_beside_it() -> None:
    cases = ROOT / "deploy/monitoring/rules_test.yaml"
    subprocess.run([tool("promtool"), "test", "rules", str(cases)], check=True)
    tests = yaml.safe_load(cases.read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test.get("alert_rule_test", ())
             if case["exp_alerts"]}  # fmt: skip
    assert fired == alerts()


def test_the_dashboard_is_that_of_the_metrics() -> None:
    subprocess.run([sys.executable, "scripts/dashboard.py", "--check"], check=True, cwd=ROOT)
    shown = " ".join(queries())
    for metric in Metrics().registry.collect():
        assert metric.name in shown


def test_the_chart_ships_the_rules(helm: str) -> None:
    command = [helm, "template", "x", str(ROOT / "deploy/chart"), "-s", "templates/monitoring.yaml"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (rules,) = (m for m in yaml.safe_load_all(text) if m["kind"] == "PrometheusRule")
    assert rules["spec"]["groups"] == yaml.safe_load(RULES.read_text())["groups"]


def eventually(missing: Callable[[], object], within_s: float = 30.0) -> None:
    """Wait until nothing is missing any more."""
    deadline = time.monotonic() + within_s
    while left := missing():
        assert time.monotonic() < deadline, f"still missing: {left}"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Inbox:
    """Where alerts arrive: a webhook of Alertmanager's, or in its absence its own interface."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        inbox = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                delivered = body["alerts"] if isinstance(body, dict) else body
                inbox.names |= {alert["labels"]["alertname"] for alert in delivered}
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class Prometheus:
    """Asks over HTTP."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/-/ready", timeout=1):
                return True
        except OSError:
            return False

    def query(self, expression: str) -> list[Any]:
        return self._ask("query", query=expression)

    def over_time(self, expression: str, seconds: float) -> list[Any]:
        now = time.time()
        return self._ask("query_range", query=expression, start=now - seconds, end=now, step=1)

    def _ask(self, path: str, **parameters: object) -> list[Any]:
        asked = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.address}/api/v1/{path}?{asked}", timeout=5) as reply:
            body = json.load(reply)
        assert body["status"] == "success", parameters
        found: list[Any] = body["data"]["result"]
        return found


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[None]:
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=20)


def hastened(rules: str) -> str:
    """The same rules at a pace for tests: minutes become seconds."""
    rules = re.sub(r"\bfor: \d+m", "for: 0s", rules)
    rules = re.sub(r"\[(1m|5m|1h)\]", "[5s]", rules).replace("[10m]", "[30s]")
    return rules.replace("interval: 5s", "interval: 1s")


@pytest.fixture(scope="module")
def inbox() -> Iterator[Inbox]:
    inbox = Inbox()
    yield inbox
    inbox.close()


@pytest.fixture(scope="module")
def image_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Small enough in everything that each alert can be provoked."""
    folder = tmp_path_factory.mktemp("image")
    tokens, config = folder / "tokens.yaml", folder / "serve.yaml"
    tokens.write_text(
        f"tokens: [{{name: u, token: {USER}}}, "
        f"{{name: a, token: {ADMIN}, scopes: [inference, admin]}}]"
    )
    config.write_text(
        "inline_limit_ms: 0\nmax_batch_rows: 8\nscheduling: {queue_limit_requests: 8}\n"
    )
    flags = ["--config", str(config), "--token-file", str(tokens)]
    server = start_server(make_tiny_bundle(folder / "tiny").path, folder / "log", *flags)
    yield server
    if server.process.poll() is None:
        assert stop_server(server) == 0


@pytest.fixture(scope="module")
def text_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("text")
    server = start_server(write_tiny(folder / "tiny"), folder / "log")
    yield server
    if server.process.poll() is None:
        assert stop_server(server) == 0


@pytest.fixture(scope="module")
def prometheus(
    tmp_path_factory: pytest.TempPathFactory,
    inbox: Inbox,
    image_server: RunningServer,
    text_server: RunningServer,
) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    binary, alertmanager = tool("prometheus"), TEMPLATE.is_file()
    ports = free_port(), free_port() if alertmanager else inbox.server.server_port
    (folder / "rules.yaml").write_text(hastened(RULES.read_text()))
    targets = [urllib.parse.urlparse(s.metrics).netloc for s in (image_server, text_server)]
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
        "route": {"receiver": "test", "group_wait": "0s", "group_interval": "1s",
                  "group_by": ["alertname"]},
        "receivers": [{"name": "test", "webhook_configs": [{"url": webhook}]}],
    }  # fmt: skip
    (folder / "alertmanager.yaml").write_text(yaml.safe_dump(routing))
    asked = Prometheus(ports[0])
    command = [binary, f"--config.file={folder / 'prometheus.yaml'}"]
    command += [f"--storage.tsdb.path={folder / 'p'}", f"--web.listen-address=127.0.0.1:{ports[0]}"]
    beside = [tool("prometheus-alertmanager"), f"--config.file={folder / 'alertmanager.yaml'}"]
    beside += [f"--storage.path={folder / 'a'}", f"--web.listen-address=127.0.0.1:{ports[1]}"]
    with contextlib.ExitStack() as processes:
        processes.enter_context(running(command, folder / "p.log"))
        if alertmanager:
            beside.append("--cluster.listen-address=")
            processes.enter_context(running(beside, folder / "a.log"))
        eventually(lambda: not asked.ready())
        yield asked


@contextlib.contextmanager
def under_load(images: RunningServer, text: RunningServer) -> Iterator[None]:
    """Callers that are in time, late, refused, denied, and one that reads text."""
    over = threading.Event()

    def call(token: str, **wishes: Any) -> None:
        with Client(images.address, access=Access(token=token)) as client:
            while not over.wait(0.01):
                with contextlib.suppress(RequestFailed):
                    client.predict(pixels(), **wishes)

    def read() -> None:
        with Client(text.address) as client:
            while not over.wait(0.05):
                for _ in client.generate("a prompt", max_tokens=5, budget_s=5.0):
                    pass

    wishes: list[dict[str, Any]] = [{"token": USER, "budget_s": 1e-6}] * 12
    wishes += [{"token": USER, "budget_s": 5.0}, {"token": "an-unknown-0123456789"}]
    threads = [threading.Thread(target=call, kwargs=kwargs) for kwargs in wishes]
    threads.append(threading.Thread(target=read))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def worker_of(server: RunningServer) -> int:
    """Process id of the worker, once there is one."""
    eventually(lambda: not process_tree(server.process.pid)[1:])
    return process_tree(server.process.pid)[1]


def answers(server: RunningServer) -> bool:
    with Client(server.address, access=Access(token=ADMIN)) as client:
        try:
            return bool(client.predict(pixels()).label)
        except RequestFailed:
            return False


def stop_for(pid: int, seconds: float) -> None:
    os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(pid, signal.SIGCONT)


def draw(prometheus: Prometheus, path: Path) -> None:
    """The dashboard's first panels over the run so far, as a picture for the documents."""
    panels = [p for p in json.loads(DASHBOARD.read_text())["panels"] if p.get("targets")][:6]
    figure, axes = plt.subplots(3, 2, figsize=(12, 9), sharex=True)
    for axis, panel in zip(axes.flat, panels, strict=True):
        for target in panel["targets"]:
            expression = filled(target["expr"])
            for series in prometheus.over_time(expression, seconds=60):
                times, values = zip(*series["values"], strict=True)
                legend = re.sub(
                    r"{{(\w+)}}",
                    lambda m, s=series: s["metric"].get(m[1], ""),
                    target["legendFormat"],
                )
                axis.plot([t - times[0] for t in times], list(map(float, values)), label=legend)
        axis.set_title(panel["title"])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    figure.suptitle("The dashboard's queries, answered by Prometheus (drawn here, not by Grafana)")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def test_metrics_pass_promtools_check(
    image_server: RunningServer, text_server: RunningServer
) -> None:
    for server in (image_server, text_server):
        with urllib.request.urlopen(server.metrics) as page:
            text = page.read()
        done = subprocess.run(
            [tool("promtool"), "check", "metrics"], input=text, capture_output=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_live_every_query_has_data_and_every_alert_is_delivered(
    prometheus: Prometheus, inbox: Inbox, image_server: RunningServer, text_server: RunningServer
) -> None:
    admin = Access(token=ADMIN)
    with under_load(image_server, text_server):
        ours = [query for query in queries() if not query.startswith("ray_")]
        assert len(ours) > 30

        def empty() -> list[str]:
            return [query for query in ours if not prometheus.query(query)]

        os.kill(worker_of(image_server), signal.SIGKILL)  # restarts are a panel, too
        eventually(empty)
        with Client(image_server.address, access=admin) as client:
            client.update_scheduling(pinned_stitch=0)  # the fastest
        stop_for(worker_of(image_server), 1.5)  # what queues meanwhile is late

        def stutters() -> set[str]:
            """Batches that take now one time, now a hundred times what is predicted."""
            stop_for(worker_of(image_server), 0.15)
            return {"LadderstitchLatencyModelWrong"} - inbox.names

        eventually(stutters)

        def dies() -> set[str]:
            os.kill(worker_of(image_server), signal.SIGKILL)
            eventually(lambda: not answers(image_server))
            return {"LadderstitchEngineRestarts"} - inbox.names

        eventually(dies)
        while_it_runs = alerts() - {"LadderstitchNotReady", "LadderstitchNoData"}
        eventually(lambda: while_it_runs - inbox.names)
        if path := os.environ.get("LADDERSTITCH_PANELS"):
            draw(prometheus, Path(path))
    with Client(image_server.address, access=admin) as client:
        client.drain()
    eventually(lambda: {"LadderstitchNotReady"} - inbox.names)
    assert stop_server(image_server) == 0
    assert stop_server(text_server) == 0
    eventually(lambda: alerts() - inbox.names)

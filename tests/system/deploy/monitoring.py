"""Prometheus, Alertmanager and what they are asked, for the tests of monitoring."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import matplotlib as mpl
import yaml

mpl.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[3]
RULES = ROOT / "deploy/chart/files/rules.yaml"
DASHBOARD = ROOT / "deploy/monitoring/dashboard.json"
TEMPLATE = Path("/usr/share/prometheus/alertmanager/default.tmpl")
"""Without it Debian's Alertmanager ends; Prometheus then posts to the inbox itself."""


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

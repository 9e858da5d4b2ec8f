"""Prometheus, an inbox of alerts, and the dashboard's queries, for the tests of monitoring."""

from __future__ import annotations

import contextlib
import json
import re
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
"""Debian's Alertmanager exits without this file; Prometheus then posts to the inbox itself."""


def alerts() -> set[str]:
    """Return the names of all alerts in the rules."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}


def queries() -> dict[str, str]:
    """Return the panel titles by expression, with Grafana's variables filled in."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return {
        fill_variables(target["expr"]): panel["title"]
        for panel in panels
        for target in panel.get("targets", ())
    }


def fill_variables(expression: str) -> str:
    """Return the expression without Grafana's variables."""
    return expression.replace("$model", ".*").replace("$__rate_interval", "5s")


def wait_until_empty(missing: Callable[[], object], timeout_s: float = 300.0) -> None:
    """Wait until `missing` returns an empty value; fail after the timeout."""
    deadline = time.monotonic() + timeout_s
    while left := missing():
        assert time.monotonic() < deadline, f"still missing: {left}"
        time.sleep(0.1)


class Inbox:
    """An HTTP server that collects the names of alerts.

    It is a webhook of Alertmanager, or replaces Alertmanager if that cannot run.
    """

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
        """Stop the server."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class Prometheus:
    """A client of Prometheus' HTTP interface."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"

    def ready(self) -> bool:
        """Return whether Prometheus answers."""
        try:
            with urllib.request.urlopen(f"{self.address}/-/ready", timeout=1):
                return True
        except OSError:
            return False

    def query(self, expression: str) -> list[Any]:
        """Return the current series of an expression."""
        return self._get("query", query=expression)

    def query_range(self, expression: str, seconds: float) -> list[Any]:
        """Return the series of the last seconds, in steps of 1 s."""
        now = time.time()
        return self._get("query_range", query=expression, start=now - seconds, end=now, step=1)

    def _get(self, path: str, **parameters: object) -> list[Any]:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.address}/api/v1/{path}?{query}", timeout=300) as reply:
            body = json.load(reply)
        assert body["status"] == "success", parameters
        found: list[Any] = body["data"]["result"]
        return found


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[None]:
    """Run a process during the `with` block."""
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=300)


def shorten_intervals(rules: str) -> str:
    """Return the rules with seconds in place of minutes."""
    rules = re.sub(r"\bfor: \d+m", "for: 0s", rules)
    rules = re.sub(r"\[(1m|5m|1h)\]", "[5s]", rules).replace("[10m]", "[30s]")
    return rules.replace("interval: 5s", "interval: 1s")


def draw(prometheus: Prometheus, path: Path) -> None:
    """Draw the dashboard's first six panels over the last minute, for the documentation."""
    panels = [p for p in json.loads(DASHBOARD.read_text())["panels"] if p.get("targets")][:6]
    figure, axes = plt.subplots(3, 2, figsize=(12, 9), sharex=True)
    for axis, panel in zip(axes.flat, panels, strict=True):
        for target in panel["targets"]:
            expression = fill_variables(target["expr"])
            for series in prometheus.query_range(expression, seconds=60):
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
    figure.suptitle(
        "Queries of the dashboard, answered by Prometheus (drawn by matplotlib, not by Grafana)"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=90)

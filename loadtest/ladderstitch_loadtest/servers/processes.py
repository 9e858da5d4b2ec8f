"""Servers that a measurement starts and stops as subprocesses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from ladderstitch.errors import UserError
from ladderstitch_loadtest.servers.peer_packages import tail

READY = re.compile(r"ready after .* gRPC on (\S+), metrics on ([^\s,]+)")
OPENAI_URL = re.compile(r"OpenAI API on http://(\S+)/v1")
"""The HTTP address in a ready line."""
STOP_TIMEOUT_S = 60.0


class StartError(UserError):
    """A server did not start, did not stop cleanly, or did not come back after a restart."""


@dataclass(frozen=True, slots=True)
class StartedServer:
    """A running server: gRPC address, URL of its metrics page, process id, its ready line."""

    address: str
    metrics: str
    pid: int
    ready_line: str

    def read_metrics(self) -> str:
        """Return the current text of the metrics page."""
        with urlopen(self.metrics, timeout=10) as reply:
            text: str = reply.read().decode()
        return text


def histogram_quantile(page: str, name: str, quantile: float) -> float:
    """Return the upper edge of the bucket that holds this quantile of a histogram.

    `page` is the text of a metrics page and `name` the histogram's name without suffix. Series of
    all labels are added up. The result is NaN if nothing was observed.
    """
    counts: dict[float, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == f"{name}_bucket":
                edge = float(sample.labels["le"])
                counts[edge] = counts.get(edge, 0.0) + sample.value
    total = counts.get(float("inf"), 0.0)
    edges = sorted(edge for edge, count in counts.items() if total and count >= quantile * total)
    return edges[0] if edges else float("nan")


@contextmanager
def ladderstitch_server(*flags: str, source: Path | None = None) -> Iterator[StartedServer]:
    """Run `ladderstitch serve` on free ports during the `with` block and stop it by Ctrl-C.

    `source` is a checkout of the project that runs instead of the installed one.
    Raises `StartError` if the server ends before it is ready, or with a status other than 0.
    """
    command = [sys.executable, "-m", "ladderstitch", "serve", "--port", "0", "--metrics-port", "0"]
    environment = os.environ | {"COLUMNS": "240", "PYTHONUNBUFFERED": "1"}
    if source is not None:
        environment["PYTHONPATH"] = str(source / "server")
    process = subprocess.Popen(
        command + list(flags), stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield _wait_until_ready(process)
    finally:
        process.send_signal(signal.SIGINT)
        status = process.wait(timeout=STOP_TIMEOUT_S)
        assert process.stdout is not None
        process.stdout.close()
    if status:
        raise StartError(f"the server stopped with status {status}")


def _wait_until_ready(process: subprocess.Popen[str]) -> StartedServer:
    assert process.stdout is not None
    for line in process.stdout:
        if ready := READY.search(line):
            return StartedServer(ready[1], ready[2], process.pid, line.strip())
    raise StartError(f"`ladderstitch serve` ended with status {process.wait()}")


@contextmanager
def echo_server() -> Iterator[str]:
    """Run the bare gRPC echo during the `with` block and yield its address."""
    with port_server([sys.executable, "-m", "ladderstitch_loadtest.benchmarks.echo"]) as address:
        yield address


@contextmanager
def port_server(command: Sequence[str], packages: Path | None = None) -> Iterator[str]:
    """Run a server that prints its port and serves until its input closes; yield its address.

    `packages` is a folder of packages that it can import besides the installed ones. Raises
    `StartError` with the end of its log if it ends before it prints a port.
    """
    environment = {} if packages is None else {"PYTHONPATH": str(packages)}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | environment,
        )
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            port = process.stdout.readline().strip()
            if not port.isdecimal():
                log.seek(0)
                raise StartError(f"{' '.join(command)} did not start:\n{tail(log.read())}")
            yield f"127.0.0.1:{port}"
        finally:
            process.stdin.close()
            process.wait(timeout=STOP_TIMEOUT_S)
            process.stdout.close()


def command_line(pid: int) -> str:
    """Return the command line of a process, or an empty string if the process has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""

"""Servers that a measurement starts for itself, and ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families


class StartFailed(Exception):
    """A server did not come up; the message holds what it said."""


@dataclass(frozen=True, slots=True)
class Served:
    """A running server: its gRPC address, its metrics page and its process."""

    address: str
    metrics: str
    pid: int
    ready_line: str

    def page(self) -> str:
        """The metrics page as it is now."""
        with urlopen(self.metrics, timeout=10) as answer:
            text: str = answer.read().decode()
        return text


def histogram_quantile(page: str, name: str, share: float) -> float:
    """Upper edge of the bucket that this quantile of a metrics page's histogram lies in.

    Over all labels; NaN if nothing was observed.
    """
    counts: dict[float, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == f"{name}_bucket":
                edge = float(sample.labels["le"])
                counts[edge] = counts.get(edge, 0.0) + sample.value
    total = counts.get(float("inf"), 0.0)
    edges = sorted(edge for edge, count in counts.items() if total and count >= share * total)
    return edges[0] if edges else float("nan")


@contextmanager
def ladderstitch_server(*flags: str) -> Iterator[Served]:
    """`ladderstitch serve` on free ports for the `with` block; Ctrl-C at its end.

    Raises `StartFailed` if it does not get ready, or does not stop cleanly.
    """
    command = [sys.executable, "-m", "ladderstitch", "serve", "--port", "0", "--metrics-port", "0"]
    environment = os.environ | {"COLUMNS": "240", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command + list(flags), stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    try:
        said = ""
        while not (ready := re.search(r"ready after .* gRPC on (\S+), metrics on (\S+)", said)):
            said = process.stdout.readline()
            if not said:
                raise StartFailed(f"`{' '.join(command)}` ended with {process.wait()}")
        yield Served(ready[1], ready[2], process.pid, said.strip())
    finally:
        process.send_signal(signal.SIGINT)
        status = process.wait(timeout=60)
        process.stdout.close()
    if status:
        raise StartFailed(f"the server stopped with status {status}")


@contextmanager
def echo_server() -> Iterator[str]:
    """The bare echo's address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ladderstitch_loadtest.benchmarks.echo"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield f"127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        process.wait(timeout=30)
        process.stdout.close()


def command_line(pid: int) -> str:
    """Of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""

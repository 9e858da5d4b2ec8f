"""Replicas and gateways as supervised processes of one machine, restarted when they die."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from prometheus_client.parser import text_string_to_metric_families

from ladderstitch.runtime.process import free_port
from ladderstitch_loadtest.servers.processes import StartError

READY = re.compile(
    r"ready.* gRPC on (\S+), metrics on (\S+)/metrics(?:, OpenAI API on http://(\S+)/v1)?"
)
START_TIMEOUT_S = 600.0
"""Limit for a start or a stop, generous enough for the slowest machine."""


class SupervisedProcess:
    """One `ladderstitch` command that is restarted at once when it ends, as systemd would do.

    `starts` counts the starts; `address`, `metrics` and `http` are those of the latest ready
    process, and empty before the first one is ready. `http` is empty without an HTTP port. With
    `restart=False`, or if it ends before it was ever ready, the command runs once.
    """

    def __init__(self, *arguments: str, restart: bool = True) -> None:
        self.arguments = arguments
        self.restart = restart
        self.starts = 0
        self._ready_count = 0
        self._ready_or_ended = threading.Event()
        self._stopping = False
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._supervise, daemon=True)
        self.address = self.metrics = self.http = ""

    def start(self) -> None:
        """Start the command and return without waiting for it."""
        self._thread.start()

    def wait_until_ready(self) -> None:
        """Wait for the first ready line; raise `StartError` if none comes within 600 s."""
        if not self._ready_or_ended.wait(timeout=START_TIMEOUT_S) or not self.address:
            raise StartError(f"`ladderstitch {' '.join(self.arguments)}` did not get ready")

    @property
    def pid(self) -> int:
        """The id of the current process."""
        assert self._process is not None, "set by `start`"
        return self._process.pid

    def kill(self) -> None:
        """Send SIGKILL to the process, which the supervisor then restarts."""
        os.kill(self.pid, signal.SIGKILL)

    def terminate(self) -> None:
        """Send SIGTERM to the process, which drains, ends and is restarted."""
        os.kill(self.pid, signal.SIGTERM)

    def wait_until_restarted(self, starts: int) -> None:
        """Wait until the command is ready for the `starts`-th time.

        Raises `StartError` if that takes longer than 600 s.
        """
        end = time.monotonic() + START_TIMEOUT_S
        while self._ready_count < starts:
            if time.monotonic() > end:
                raise StartError(f"`ladderstitch {' '.join(self.arguments)}` did not come back")
            time.sleep(0.05)

    def stop(self) -> int:
        """Stop the command by Ctrl-C and return its exit status."""
        self._stopping = True
        assert self._process is not None, "set by `start`"
        self._process.send_signal(signal.SIGINT)
        self._thread.join(timeout=START_TIMEOUT_S)
        return self._process.wait(timeout=START_TIMEOUT_S)

    def _supervise(self) -> None:
        while not self._stopping:
            self._run_once()
            if not self.restart or not self._ready_count:
                break
        self._ready_or_ended.set()

    def _run_once(self) -> None:
        environment = os.environ | {"COLUMNS": "240", "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ladderstitch", *self.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.starts += 1
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                if ready := READY.search(line):
                    self.address, self.metrics, self.http = ready[1], ready[2], ready[3] or ""
                    self._ready_count += 1
                    self._ready_or_ended.set()
        self._process.wait()


@contextmanager
def replicas_and_gateways(
    replicas: int = 2, gateways: int = 1, *flags: str, gateway_flags: Sequence[str] = ()
) -> Iterator[tuple[list[SupervisedProcess], list[SupervisedProcess]]]:
    """Run replicas, and gateways that share one port in front of them, during the `with` block.

    `flags` are options of `ladderstitch serve`, `gateway_flags` those of `ladderstitch gateway`.
    Raises `StartError` if a process does not get ready.
    """
    ports = free_ports(replicas + 2)
    behind = [_replica(port, flags) for port in ports[:replicas]]
    front = [_gateway(ports[-1], ports[:replicas], gateway_flags) for _ in range(gateways)]
    processes = [*behind, *front]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.wait_until_ready()
        yield behind, front
    finally:
        for process in reversed(processes):
            process.stop()


def _replica(port: int, flags: Sequence[str]) -> SupervisedProcess:
    return SupervisedProcess(
        "serve", "--no-ray", "--port", str(port), "--metrics-port", "0", *flags
    )


def _gateway(port: int, replica_ports: Sequence[int], flags: Sequence[str]) -> SupervisedProcess:
    named = [text for replica in replica_ports for text in ("--replica", f"127.0.0.1:{replica}")]
    ports = ("--port", str(port), "--metrics-port", "0", "--share-port")
    return SupervisedProcess("gateway", *named, *ports, *flags)


class HasMetrics(Protocol):
    """A process with a metrics page, whose address changes when the process is restarted."""

    @property
    def metrics(self) -> str:
        """URL of the current process without `/metrics`."""


def wait_until_serving(
    gateways: Sequence[HasMetrics], replicas: int, timeout_s: float = 600.0
) -> None:
    """Wait until every gateway's metrics page counts `replicas` serving replicas.

    Raises `TimeoutError`.
    """
    end = time.monotonic() + timeout_s
    while any(count_serving(gateway.metrics) != replicas for gateway in gateways):
        if time.monotonic() > end:
            counts = {gateway.metrics: count_serving(gateway.metrics) for gateway in gateways}
            raise TimeoutError(f"serving replicas: expected {replicas}, got {counts}")
        time.sleep(0.1)


def count_serving(url: str) -> int:
    """Return the serving replicas that a gateway's metrics page counts; 0 if it is unreadable."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=5) as reply:
            text = reply.read().decode()
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith('ladderstitch_gateway_replicas{state="serving"}'):
            return int(float(line.rpartition(" ")[2]))
    return 0


def count_requests(url: str) -> float:
    """Return the queued and running requests that a replica's metrics page counts."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as page:
        families = text_string_to_metric_families(page.read().decode())
    wanted = {"ladderstitch_queue_requests", "ladderstitch_running_requests"}
    return sum(s.value for family in families if family.name in wanted for s in family.samples)


def free_ports(count: int) -> list[int]:
    """Return distinct loopback ports that no process uses."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port("127.0.0.1"))
    return list(ports)

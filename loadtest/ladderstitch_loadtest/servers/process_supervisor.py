"""Replicas and gateways as processes of one machine, each of which can be killed and comes back."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ladderstitch.runtime.process import free_port
from ladderstitch_loadtest.servers.processes import StartFailed

READY = re.compile(r"ready.* gRPC on (\S+), metrics on (\S+)/metrics")
START_S = 600.0
"""A process that is not ready by then has failed, on the slowest machine, too."""


class Process:
    """One command; what is killed from outside is started again at once, as systemd would."""

    def __init__(self, *arguments: str, restart: bool = True) -> None:
        self.arguments = arguments
        self.restart = restart
        self.starts = 0
        self._readies = 0
        self._ready = threading.Event()
        self._stopping = False
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._supervise, daemon=True)
        self.address = self.metrics = ""

    def start(self) -> None:
        self._thread.start()

    def until_ready(self) -> None:
        """Raises `StartFailed` if it does not come up."""
        if not self._ready.wait(timeout=START_S) or not self.address:
            raise StartFailed(f"`ladderstitch {' '.join(self.arguments)}` did not come up")

    @property
    def pid(self) -> int:
        """Of the process as it is now."""
        assert self._process is not None, "set by `start`"
        return self._process.pid

    def kill(self) -> None:
        """`kill -9`."""
        os.kill(self.pid, signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM: it drains, ends, and is started again."""
        os.kill(self.pid, signal.SIGTERM)

    def until_restarted(self, starts: int) -> None:
        """Wait until it is ready for the `starts`-th time; raises `StartFailed` if that fails."""
        end = time.monotonic() + START_S
        while self._readies < starts:
            if time.monotonic() > end:
                raise StartFailed(f"`ladderstitch {' '.join(self.arguments)}` did not come back")
            time.sleep(0.05)

    def stop(self) -> int:
        """Ctrl-C; the exit status."""
        self._stopping = True
        assert self._process is not None, "set by `start`"
        self._process.send_signal(signal.SIGINT)
        self._thread.join(timeout=START_S)
        return self._process.wait(timeout=START_S)

    def _supervise(self) -> None:
        while not self._stopping:
            self._run()
            if not self.restart:
                break
        self._ready.set()

    def _run(self) -> None:
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
        with self._process.stdout as said:
            for line in said:
                if ready := READY.search(line):
                    self.address, self.metrics = ready[1], ready[2]
                    self._readies += 1
                    self._ready.set()
        self._process.wait()


@contextmanager
def stage(
    replicas: int = 2, gateways: int = 1, *flags: str, gateway_flags: Sequence[str] = ()
) -> Iterator[tuple[list[Process], list[Process]]]:
    """So many replicas, and gateways on one port before them, for the `with` block.

    `flags` are of `ladderstitch serve`, `gateway_flags` of `ladderstitch gateway`. Raises
    `StartFailed` if one does not come up.
    """
    ports = free_ports(replicas + 2)
    served = [
        Process("serve", "--no-ray", "--port", str(port), "--metrics-port", "0", *flags)
        for port in ports[:replicas]
    ]
    named = [text for port in ports[:replicas] for text in ("--replica", f"127.0.0.1:{port}")]
    fronts = [
        Process(
            "gateway",
            *named,
            "--port",
            str(ports[-1]),
            "--metrics-port",
            "0",
            "--share-port",
            *gateway_flags,
        )
        for _ in range(gateways)
    ]
    everything = [*served, *fronts]
    for process in everything:
        process.start()
    try:
        for process in everything:
            process.until_ready()
        yield served, fronts
    finally:
        for process in reversed(everything):
            process.stop()


def free_ports(count: int) -> list[int]:
    """Distinct ports of loopback that nobody has."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port("127.0.0.1"))
    return list(ports)

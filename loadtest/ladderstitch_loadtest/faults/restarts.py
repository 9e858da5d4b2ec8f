"""The time from the death of the only replica to the next good answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from ladderstitch.bundles import is_language_bundle
from ladderstitch.cli.supervisor import BEAT_S, LOST_BEATS, STEADY_S
from ladderstitch.client import Client, RequestFailed
from ladderstitch_loadtest.faults.fuzz_runner import process_tree
from ladderstitch_loadtest.servers.process_supervisor import SupervisedProcess, free_ports
from ladderstitch_loadtest.servers.processes import StartError

RETRY_S = 0.02
"""Pause between two attempts of the caller."""
ATTEMPT_S = 1.0
"""Deadline of an attempt."""
TIMEOUT_S = 600.0
"""Limit for an answer, generous enough for the slowest machine."""
SPARE_FACTOR, SPARE_EXTRA_S, COLD_FACTOR = 1.5, 1.0, 4.0
"""Limits as multiples of the time of `import torch`, and seconds added to that of a spare."""


@dataclass(frozen=True, slots=True)
class RestartCase:
    """A bundle, whether a spare process restarts its server, and the signal that ends the server.

    A server that gets SIGSTOP hangs, and its supervisor has to notice that.
    """

    bundle: Path
    spare: bool
    signal: signal.Signals

    @property
    def name(self) -> str:
        """The case in words."""
        kind = "language" if is_language_bundle(self.bundle) else "images"
        return f"{kind}, {'spare' if self.spare else 'supervised'}, {self.signal.name}"

    def limit_s(self, import_s: float) -> float:
        """Return the limit of the median, from the seconds of `import torch`.

        A hang is noticed only after some missing beats, of which the first may just be due.
        """
        noticed_s = (LOST_BEATS + 1) * BEAT_S if self.signal == signal.SIGSTOP else 0.0
        if self.spare:
            return SPARE_FACTOR * import_s + SPARE_EXTRA_S + noticed_s
        return COLD_FACTOR * import_s


@dataclass(frozen=True, slots=True)
class RestartTimes:
    """The seconds from each signal to the next good answer, and of an import of torch before it.

    Both are measured in turn, so that other load on the machine affects them equally.
    """

    case: RestartCase
    seconds: list[float]
    imports: list[float]

    @property
    def median_s(self) -> float:
        """The median of the seconds."""
        return median(self.seconds)

    @property
    def limit_s(self) -> float:
        """The limit of the median."""
        return self.case.limit_s(median(self.imports))

    @property
    def passed(self) -> bool:
        """Whether the median is within the limit."""
        return self.median_s <= self.limit_s

    def to_dict(self) -> dict[str, object]:
        """Return the fields for a result file."""
        return {
            "case": self.case.name,
            "median_s": round(self.median_s, 3),
            "limit_s": round(self.limit_s, 3),
            "import_torch_s": round(median(self.imports), 3),
            "seconds": [round(seconds, 3) for seconds in self.seconds],
        }


def time_import() -> float:
    """Return the seconds of a Python process that imports torch."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.monotonic() - started


def time_restarts(
    case: RestartCase, times: int, advance: Callable[[], None], pause_s: float = STEADY_S + 1
) -> RestartTimes:
    """End the server of a case again and again, and return the times to the next good answers.

    At least `pause_s` precede each end: a server that dies soon is started again after a while.
    Raises `StartError` if the server does not start or survives, and `TimeoutError` if no answer
    comes.
    """
    port, metrics_port = free_ports(2)
    flags = ["--port", str(port), "--metrics-port", str(metrics_port)]
    flags += ["--spare"] if case.spare else []
    process = SupervisedProcess("serve", "--no-ray", "--model", str(case.bundle), *flags)
    process.start()
    found = RestartTimes(case, [], [])
    try:
        process.wait_until_ready()
        wait_for_answer(process.address, case.bundle)
        for _ in range(times):
            import_s = time_import()
            found.imports.append(import_s)
            time.sleep(max(0.0, pause_s - import_s))
            found.seconds.append(_time_restart(process, case))
            advance()
    finally:
        process.stop()
    return found


def _time_restart(process: SupervisedProcess, case: RestartCase) -> float:
    """End the server by the signal and return the seconds to the next good answer."""
    pid = process_tree(process.pid)[1] if case.spare else process.pid
    started = time.monotonic()
    os.kill(pid, case.signal)
    time.sleep(RETRY_S)
    wait_for_answer(process.address, case.bundle)
    seconds = time.monotonic() - started
    if case.spare and process_tree(process.pid)[1] == pid:
        raise StartError(f"{case.name}: process {pid} still runs after {case.signal.name}")
    return seconds


def wait_for_answer(address: str, bundle: Path) -> None:
    """Call a server every 20 ms until it answers; raises `TimeoutError` after ten minutes.

    Every attempt has a connection of its own, since gRPC waits longer and longer before it connects
    again.
    """
    end = time.monotonic() + TIMEOUT_S
    pixels = np.zeros((1, 1, 28, 28), np.uint8)
    while True:
        try:
            with Client(address, timeout_s=ATTEMPT_S, retry_policy=None) as client:
                if is_language_bundle(bundle):
                    list(client.generate("a b", max_tokens=1))
                else:
                    client.predict(pixels)
            return
        except RequestFailed as error:
            if time.monotonic() > end:
                raise TimeoutError(f"no answer in {TIMEOUT_S:.0f} s: {error}") from error
            time.sleep(RETRY_S)

"""The breakdown of an answer: stages from the server's statistics, processor time by thread."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from ladderstitch_loadtest.benchmarks.breakdown import (
    Breakdown,
    measure_run,
    read_cpu_times,
    summarise,
)
from ladderstitch_loadtest.benchmarks.breakdown_cli import format_table
from ladderstitch_loadtest.servers.processes import StartedServer, echo_server
from tests.loadtest.test_peers import fake_triton

BUSY_S = 0.3


def spend(seconds: float) -> None:
    """Use the processor for some seconds of this thread's time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def make_breakdown(callers: int, value: float) -> Breakdown:
    """Return a breakdown in which every figure has this value."""
    fields = dict.fromkeys(Breakdown.__dataclass_fields__, value)
    return Breakdown(**fields | {"callers": callers})


def test_cpu_times_tell_threads_and_children_apart() -> None:
    before = read_cpu_times(os.getpid())
    child = subprocess.Popen(
        [sys.executable, "-c", f"{SPEND_IN_CHILD}\nprint(flush=True)\ninput()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    child.stdout.readline()
    thread = threading.Thread(target=spend, args=(BUSY_S,))
    thread.start()
    spend(2 * BUSY_S)
    inside = read_cpu_times(os.getpid())
    thread.join()
    after = read_cpu_times(os.getpid())
    child.communicate("\n")
    assert after["loop"] - before["loop"] >= 2 * BUSY_S - 0.05  # the clock has ticks of 10 ms
    assert inside["other"] >= before["other"]
    assert after["workers"] - before["workers"] >= BUSY_S - 0.05


SPEND_IN_CHILD = f"""
import time
end = time.thread_time() + {BUSY_S}
while time.thread_time() < end:
    pass
"""


def test_measure_run_splits_the_latency() -> None:
    with fake_triton("success") as peer, echo_server() as echo:
        server = StartedServer(peer.target.address, "", os.getpid(), "")
        run = measure_run(server, echo, b"message", 2, 0.2, "grpc")
    assert run.compute_ms == pytest.approx(2)
    assert run.queue_ms + run.dispatch_ms == pytest.approx(1)
    stages = run.transport_ms + run.queue_ms + run.dispatch_ms + run.compute_ms
    assert stages == pytest.approx(run.latency_ms)
    assert run.mean_batch == pytest.approx(2, rel=0.2)
    assert run.answers_per_s > 0


def test_summarise_takes_medians() -> None:
    found = summarise([make_breakdown(8, value) for value in (1.0, 5.0, 2.0)])
    assert found == make_breakdown(8, 2.0)


def test_format_table_fits_80_columns() -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(format_table([make_breakdown(n, 12345.678) for n in (1, 8, 32)]))
    lines = captured.get().splitlines()
    assert "12,346" in captured.get()
    assert max(map(len, lines)) <= 80
    assert "..." not in captured.get()

"""A closed loop: callers that send one fixed gRPC message each, again and again.

The generator is `h2load` (Debian package nghttp2-client), or a process of `grpc.aio` if it is not
installed. Every caller has a connection of its own and one call in flight.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import grpc

from ladderstitch_loadtest.load.workers import WaitForStart, run_workers, wait_until_connected

Generator = Literal["h2load", "grpc"]
WARM_UP_S = 0.3
"""Time at the start of a run whose answers are not counted."""
H2LOAD_TIMEOUT_S = 60.0
"""Time that h2load may take beyond the length of the run."""
GRPC_HEADERS = ("content-type: application/grpc", "te: trailers")
LOCAL_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
"""Channels with this option do not share a connection."""

Call = tuple[float, float]
"""Start and duration of a call in seconds."""


@dataclass(frozen=True, slots=True)
class LoopTarget:
    """A gRPC method at host:port, and the serialised message that is sent to it."""

    address: str
    method: str
    message: bytes


@dataclass(frozen=True, slots=True)
class LoopResult:
    """The answers of one run, without the first 0.3 s: latency in ms, answers per second."""

    answers: int
    mean_ms: float
    p50_ms: float
    answers_per_s: float


class LoopError(Exception):
    """The generator failed, or a call did."""


def find_generator() -> Generator:
    """Return `h2load` if it is installed, else `grpc`."""
    return "h2load" if shutil.which("h2load") else "grpc"


def run_loop(target: LoopTarget, callers: int, seconds: float, generator: Generator) -> LoopResult:
    """Send for `seconds` after a short warm-up, and return latency and throughput.

    Raises `LoopError` if a call fails. `h2load` does not read the status of gRPC: its caller has to
    check that the server answered.
    """
    run = _run_h2load if generator == "h2load" else _run_worker
    return summarise(run(target, callers, WARM_UP_S + seconds))


def summarise(calls: Sequence[Call]) -> LoopResult:
    """Return latency and throughput of the calls that ended after the warm-up."""
    first = min((start for start, _ in calls), default=0.0)
    ends = [start + duration - first - WARM_UP_S for start, duration in calls]
    counted = [duration for end, (_, duration) in zip(ends, calls, strict=True) if end > 0]
    if not counted:
        raise LoopError("no call ended after the warm-up")
    return LoopResult(
        len(counted), 1e3 * fmean(counted), 1e3 * median(counted), len(counted) / max(ends)
    )


def format_h2load(target: LoopTarget, callers: int, seconds: float, folder: Path) -> list[str]:
    """Return the command line of h2load, which reads FOLDER/message and writes FOLDER/calls."""
    command = ["h2load", "--clients", str(callers), "--max-concurrent-streams", "1"]
    command += ["--duration", f"{round(1e3 * seconds)}ms"]
    command += ["--data", str(folder / "message"), "--log-file", str(folder / "calls")]
    for header in GRPC_HEADERS:
        command += ["--header", header]
    return [*command, f"http://{target.address}{target.method}"]


def _run_h2load(target: LoopTarget, callers: int, seconds: float) -> list[Call]:
    with tempfile.TemporaryDirectory(prefix="ladderstitch-h2load-") as name:
        folder = Path(name)
        length = len(target.message).to_bytes(4, "big")
        (folder / "message").write_bytes(b"\0" + length + target.message)
        command = format_h2load(target, callers, seconds, folder)
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds + H2LOAD_TIMEOUT_S
        )
        if done.returncode:
            raise LoopError(f"h2load ended with status {done.returncode}: {done.stderr.strip()}")
        return parse_calls((folder / "calls").read_text())


def parse_calls(log: str) -> list[Call]:
    """Return the calls in a log of h2load: lines of start in us, HTTP status, duration in us.

    Status -1 is that of calls which the end of the run cut off. Raises `LoopError` for other
    failures.
    """
    calls = []
    for line in log.splitlines():
        start, status, duration = line.split("\t")[:3]
        if status == "200":
            calls.append((int(start) / 1e6, int(duration) / 1e6))
        elif status != "-1":
            raise LoopError(f"h2load: expected HTTP status 200, got {status}")
    return calls


@dataclass(frozen=True, slots=True)
class LoopWorker:
    """The closed loop of one generator process; it is pickled to that process."""

    target: LoopTarget
    callers: int
    seconds: float
    cpu: int | None = None

    async def send(self, wait_for_start: WaitForStart) -> list[Any]:
        """Connect, wait for the start, send, and return the calls."""
        async with AsyncExitStack() as stack:
            channels = [
                await stack.enter_async_context(
                    grpc.aio.insecure_channel(self.target.address, options=LOCAL_CONNECTION)
                )
                for _ in range(self.callers)
            ]
            await asyncio.gather(*map(wait_until_connected, channels))
            start = wait_for_start()
            await asyncio.sleep(start - time.monotonic())
            loops = (self._call(channel, start + self.seconds) for channel in channels)
            return [call for calls in await asyncio.gather(*loops) for call in calls]

    async def _call(self, channel: grpc.aio.Channel, end: float) -> list[Call]:
        call, message = channel.unary_unary(self.target.method), self.target.message
        calls = []
        while (started := time.monotonic()) < end:
            await call(message)
            calls.append((started, time.monotonic() - started))
        return calls


def _run_worker(target: LoopTarget, callers: int, seconds: float) -> list[Call]:
    try:
        (calls,) = run_workers([LoopWorker(target, callers, seconds)])
    except (EOFError, RuntimeError) as error:
        raise LoopError(f"the generator of {target.method} failed; see its error above") from error
    return calls

"""Where the time of one answer goes: stages of its latency, and processor time by thread."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np

from ladderstitch.oip import grpc_service_pb2 as oip
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch_loadtest.benchmarks.echo import METHOD
from ladderstitch_loadtest.benchmarks.peer_servers import INFER, call, make_request
from ladderstitch_loadtest.benchmarks.peers import STATISTICS
from ladderstitch_loadtest.load.closed_loop import Generator, LoopTarget, run_loop
from ladderstitch_loadtest.servers.processes import StartedServer, echo_server, ladderstitch_server

CALLERS = (1, 8, 32)
WARM_UP_S = 1.0
VARIANT = 0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
GRPC_THREADS = ("event_engine", "grpc", "timer", "resolver")
"""Beginnings of the names that gRPC gives its threads."""


@dataclass(frozen=True, slots=True)
class Breakdown:
    """The parts of a mean answer at a number of callers, medians over the rounds.

    `latency_ms` is measured by the caller and is the sum of the four stages: `transport_ms` (gRPC,
    the sockets and the generator), `queue_ms` (from the handler's start to the batch's),
    `dispatch_ms` (from the batch's start to the answer, without compute) and `compute_ms`.
    `echo_ms` is the latency of a bare echo of the same bytes. The processor time of the server in
    microseconds per answer is that of the event loop's thread, of gRPC's threads, of the other
    threads, of which compute is the largest, and of worker processes.
    """

    callers: int
    answers_per_s: float
    echo_answers_per_s: float
    latency_ms: float
    echo_ms: float
    transport_ms: float
    queue_ms: float
    dispatch_ms: float
    compute_ms: float
    mean_batch: float
    loop_us: float
    grpc_us: float
    other_threads_us: float
    workers_us: float

    def to_dict(self) -> dict[str, float]:
        """Return the fields for a result file."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Counters:
    """What a server has counted since its start: answers, batches, seconds of stages and of CPU."""

    answers: int
    batches: int
    total_s: float
    queue_s: float
    compute_s: float
    cpu_s: dict[str, float]


def measure(
    path: Path,
    rounds: int,
    seconds: float,
    generator: Generator,
    source: Path | None,
    advance: Callable[[str], None],
) -> list[Breakdown]:
    """Return the breakdown at 1, 8 and 32 callers of the first network of a bundle.

    `source` is a checkout of the project whose server is measured instead of the installed one.
    """
    manifest = VisionBundle.load(path).manifest
    inputs = manifest.preprocessing
    shape = (inputs.channels, inputs.height, inputs.width)
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    message = make_request(manifest.name, image, VARIANT)
    advance("starting")
    with (
        echo_server() as echo,
        ladderstitch_server("--no-ray", "--bundle", str(path), source=source) as server,
    ):
        run_loop(LoopTarget(server.address, INFER, message), 8, WARM_UP_S, generator)
        runs: dict[int, list[Breakdown]] = defaultdict(list)
        for number in range(rounds):
            for callers in CALLERS:
                advance(f"round {number + 1} of {rounds}: {callers} callers")
                runs[callers].append(
                    measure_run(server, echo, message, callers, seconds, generator)
                )
    return [summarise(found) for found in runs.values()]


def measure_run(
    server: StartedServer,
    echo: str,
    message: bytes,
    callers: int,
    seconds: float,
    generator: Generator,
) -> Breakdown:
    """Return the breakdown of one run, which follows one run of the echo."""
    bare = run_loop(LoopTarget(echo, METHOD, message), callers, seconds, generator)
    before = read_counters(server)
    found = run_loop(LoopTarget(server.address, INFER, message), callers, seconds, generator)
    after = read_counters(server)
    answers = after.answers - before.answers
    total, queue, compute = (
        1e3 * (getattr(after, stage) - getattr(before, stage)) / answers
        for stage in ("total_s", "queue_s", "compute_s")
    )
    cpu = {
        group: 1e6 * (after.cpu_s[group] - before.cpu_s.get(group, 0.0)) / answers
        for group in after.cpu_s
    }
    return Breakdown(
        callers=callers,
        answers_per_s=found.answers_per_s,
        echo_answers_per_s=bare.answers_per_s,
        latency_ms=found.mean_ms,
        echo_ms=bare.mean_ms,
        transport_ms=found.mean_ms - total,
        queue_ms=queue,
        dispatch_ms=total - queue - compute,
        compute_ms=compute,
        mean_batch=answers / (after.batches - before.batches),
        loop_us=cpu["loop"],
        grpc_us=cpu["grpc"],
        other_threads_us=cpu["other"],
        workers_us=cpu["workers"],
    )


def read_counters(server: StartedServer) -> Counters:
    """Return the statistics of the server's only model and the processor time of the server."""
    reply = call(server.address, STATISTICS, oip.ModelStatisticsRequest().SerializeToString())
    (model,) = oip.ModelStatisticsResponse.FromString(reply).model_stats
    stats = model.inference_stats
    return Counters(
        answers=stats.success.count,
        batches=model.execution_count,
        total_s=stats.success.ns / 1e9,
        queue_s=stats.queue.ns / 1e9,
        compute_s=stats.compute_infer.ns / 1e9,
        cpu_s=read_cpu_times(server.pid),
    )


def read_cpu_times(pid: int) -> dict[str, float]:
    """Return the seconds of CPU of a process by group of threads, and of its child processes."""
    seconds = {"loop": 0.0, "grpc": 0.0, "other": 0.0, "workers": 0.0}
    for task in Path(f"/proc/{pid}/task").iterdir():
        head, _, fields = (task / "stat").read_text().rpartition(")")
        name = head.partition("(")[2]
        user, system = fields.split()[11:13]  # the 14th and 15th field of the file
        group = "grpc" if name.startswith(GRPC_THREADS) else "other"
        group = "loop" if task.name == str(pid) else group
        seconds[group] += (int(user) + int(system)) / TICKS_PER_S
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        seconds["workers"] += sum(read_cpu_times(int(child)).values())
    return seconds


def summarise(runs: Sequence[Breakdown]) -> Breakdown:
    """Return the medians of all fields, with three decimals."""
    names = Breakdown.__dataclass_fields__
    medians = {name: round(median(getattr(run, name) for run in runs), 3) for name in names}
    return Breakdown(**medians)

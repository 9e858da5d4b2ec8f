"""The GPU that a check or a benchmark runs on: its presence, its description, and timing."""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import triton
from torch import Tensor


def missing_gpu() -> str | None:
    """Return the reason why nothing can run on a GPU here, or None if it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    return None


def describe() -> dict[str, str]:
    """Return device, driver and versions, for a result file."""
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver.stdout.splitlines()[0] if driver.returncode == 0 else "unknown",
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def medians_us(
    calls: Mapping[str, Callable[[], object]],
    rounds: int = 50,
    cold_bytes: int = 2**30,
    before: Mapping[str, Callable[[], object]] | None = None,
    after: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, float]:
    """Return the median microseconds of each call, by CUDA events and with a cold L2 cache.

    The calls take turns for `rounds` rounds. Before each call, `cold_bytes` are overwritten: this
    flushes the cache, and keeps the GPU busy until the whole call is enqueued, so that the time of
    its launches is not counted. The functions in `before` and `after` run around the call of the
    same name and are not timed.
    """
    before, after = before or {}, after or {}
    flush = torch.empty(cold_bytes, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 3):
        for name, call in calls.items():
            if name in before:
                before[name]()
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            if name in after:
                after[name]()
            if round_ >= 3:  # the first rounds compile and warm up
                times[name].append(start.elapsed_time(end) * 1000)
    return {name: statistics.median(taken) for name, taken in times.items()}


class Waiting(Protocol):
    """An end of a communication between ranks, whose waits can be released."""

    def stop(self) -> None:
        """End every wait of this rank at once."""

    def resume(self) -> None:
        """Let this rank wait again."""


def capture_graph(
    calls: Sequence[Callable[[], Tensor]], waiting: Sequence[Waiting]
) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """Capture calls into a CUDA graph, each on its own stream, and return graph and outputs.

    All calls run concurrently in the graph, one for each rank in `waiting`. Before the capture they
    run one after another with their waits released, so that every kernel is compiled and loaded.
    Loading a kernel may wait for the kernels that run, and one that waits for a rank whose kernel
    is not loaded yet would never end.
    """
    main, *streams = (torch.cuda.Stream() for _ in range(1 + len(calls)))
    for stream, call, rank in zip(streams, calls, waiting, strict=True):
        rank.stop()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            call()
        torch.cuda.synchronize()
        rank.resume()

    def fork() -> list[Tensor]:
        outputs = []
        for stream, call in zip(streams, calls, strict=True):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                outputs.append(call())
        for stream in streams:
            main.wait_stream(stream)
        return outputs

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # the capture stream of torch itself may be among `streams`: it hands out 32 streams in turn
    with torch.cuda.graph(graph, stream=main):
        outputs = fork()
    return graph, outputs

"""CUDA graphs: a pass over fixed memory that is captured once, and then replayed in one launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import torch

WARM_UP_RUNS = 3
"""Eager runs before a capture, in which libraries and Triton initialise and allocate."""

T = TypeVar("T")
Pool: TypeAlias = Any
"""The handle of a memory pool that graphs share."""


def bucket_of(size: int, largest: int) -> int:
    """Return the batch size of the graph that runs a batch: a power of two, or the largest."""
    return min(1 << (size - 1).bit_length(), largest)


@dataclass(frozen=True, slots=True)
class CapturedPass(Generic[T]):
    """A captured pass: `replay` computes it on the memory it was captured with."""

    replay: Callable[[], None]
    output: T
    """The tensors of the output; every replay overwrites them."""


class GraphBackend(Protocol):
    """The seam to CUDA's graphs; calls never overlap."""

    def make_pool(self) -> Pool:
        """Return a new memory pool, which lives as long as a graph uses it."""

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run a function eagerly on a side stream until it can be captured."""

    def capture(self, run: Callable[[], T], pool: Pool) -> CapturedPass[T]:
        """Return the pass that one call of a function records; the call computes nothing.

        The temporary tensors and the output lie in the pool.
        """


class CudaGraphs:
    """The graphs of torch on the current CUDA device, captured on one side stream.

    Warm-up and captures share the stream, so that workspaces of libraries, which belong to a
    stream, exist before a capture. cuDNN must not try algorithms during a capture; its benchmark
    is therefore turned off for the process.
    """

    def __init__(self) -> None:
        torch.backends.cudnn.benchmark = False
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no type

    def make_pool(self) -> Pool:
        """Return the handle of a new pool of torch's caching allocator."""
        return torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run a function `WARM_UP_RUNS` times on the side stream and wait for it."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP_RUNS):
                run()
        self._stream.synchronize()

    def capture(self, run: Callable[[], T], pool: Pool) -> CapturedPass[T]:
        """Return the captured pass; its `replay` runs on the stream that is then current.

        The outer context restores the caller's stream: `torch.cuda.graph` does not if the end of a
        capture fails.
        """
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(self._stream),
            torch.cuda.graph(graph, pool=pool, stream=self._stream),
        ):
            output = run()
        return CapturedPass(graph.replay, output)

"""Counts and durations since start, as Open Inference Protocol clients ask for them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Total:
    """How often and how long in all."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds


@dataclass(slots=True)
class Statistics:
    """Of one model; `inferences` counts images, `batches` is by batch size in rows."""

    success: Total = field(default_factory=Total)
    fail: Total = field(default_factory=Total)
    queue: Total = field(default_factory=Total)
    compute: Total = field(default_factory=Total)
    batches: dict[int, Total] = field(default_factory=dict)
    inferences: int = 0
    last_inference_ms: int = 0

    def computed(self, rows: int, seconds: float) -> None:
        self.batches.setdefault(rows, Total()).add(seconds)
        self.last_inference_ms = time.time_ns() // 1_000_000

    def answered(self, rows: int, queue_s: float, compute_s: float, total_s: float) -> None:
        self.inferences += rows
        self.success.add(total_s)
        self.queue.add(queue_s)
        self.compute.add(compute_s)

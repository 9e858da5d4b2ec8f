"""The numbers of requests and batches of one model, and their seconds, since it was loaded.

Schedulers count them for the `ModelStatistics` of Triton's clients, whose rules hold: `success`,
`queue` and `compute` count the same answers, and the batches by size add up to all batches.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Total:
    """A number of events and the sum of their seconds."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one event."""
        self.count += 1
        self.seconds += seconds


@dataclass(slots=True)
class Statistics:
    """The totals of one model since it was loaded."""

    success: Total = field(default_factory=Total)
    fail: Total = field(default_factory=Total)
    queue: Total = field(default_factory=Total)
    compute: Total = field(default_factory=Total)
    batches: dict[int, Total] = field(default_factory=dict)
    """Batches and their seconds of compute, by batch size: images, or 1 for a generated text."""
    inferences: int = 0
    """Images, or generated texts, that were answered."""
    last_inference_ms: int = 0
    """Unix time of the last batch in milliseconds; 0 before the first."""

    def add_batch(self, batch_size: int, compute_s: float) -> None:
        """Count one batch."""
        self.batches.setdefault(batch_size, Total()).add(compute_s)
        self.last_inference_ms = time.time_ns() // 1_000_000

    def add_generation(self, queue_s: float, total_s: float) -> None:
        """Count one generated text as an answer and as a batch of one.

        Triton's language-model backends count so, too: the steps that many texts share have no
        place in these statistics.
        """
        self.add_batch(1, total_s - queue_s)
        self.add_answer(1, queue_s, total_s - queue_s, total_s)

    def add_answer(self, num_images: int, queue_s: float, compute_s: float, total_s: float) -> None:
        """Count one answered request."""
        self.inferences += num_images
        self.success.add(total_s)
        self.queue.add(queue_s)
        self.compute.add(compute_s)

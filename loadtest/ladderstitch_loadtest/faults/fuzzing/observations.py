"""What a run leaves behind in a server: memory, descriptors, processes, delays of its loop."""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass

from prometheus_client.parser import text_string_to_metric_families

from ladderstitch_loadtest.faults.fuzz_runner import memory_mb, process_tree

LAG = "ladderstitch_event_loop_lag_seconds"
"""The histogram of the delays of the server's event loop."""
POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Footprint:
    """Unshared memory in MiB, open descriptors and number of a process and its descendants."""

    memory_mb: float
    descriptors: int
    processes: int

    def to_dict(self) -> dict[str, object]:
        """Return the figures for a result file."""
        return asdict(self) | {"memory_mb": round(self.memory_mb, 1)}


def footprint(pid: int) -> Footprint:
    """Return the footprint of a process and its descendants."""
    pids = process_tree(pid)
    descriptors = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
    return Footprint(memory_mb(pids), descriptors, len(pids))


def settled_footprint(pid: int, limit: Footprint | None, timeout_s: float) -> Footprint:
    """Return the footprint once it has no more descriptors and processes than `limit`.

    After `timeout_s`, the last one is returned. Without a limit, waits until the number of
    descriptors stays the same for half a second.
    """
    end = time.monotonic() + timeout_s
    last = footprint(pid)
    while time.monotonic() < end:
        time.sleep(POLL_S)
        now = footprint(pid)
        most = last if limit is None else limit
        last = now
        if now.descriptors <= most.descriptors and now.processes <= most.processes:
            break
    return last


def buckets(page: str, name: str) -> dict[float, float]:
    """Return the cumulative count at each upper edge of a histogram, all series added up."""
    counts: dict[float, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == f"{name}_bucket":
                edge = float(sample.labels["le"])
                counts[edge] = counts.get(edge, 0.0) + sample.value
    return counts


def quantile_between(before: str, after: str, name: str, quantile: float) -> float:
    """Return the upper edge of the bucket with this quantile of the values between two pages.

    The result is NaN if there are none, or if the pages lack the histogram.
    """
    old, new = buckets(before, name), buckets(after, name)
    counts = {edge: count - old.get(edge, 0.0) for edge, count in new.items()}
    total = counts.get(math.inf, 0.0)
    edges = sorted(edge for edge, count in counts.items() if total and count >= quantile * total)
    return edges[0] if edges else math.nan

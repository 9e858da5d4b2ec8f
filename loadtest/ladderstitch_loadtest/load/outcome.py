"""How every request of a trace ended, simulated or real, and the figures that sum it up."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from ladderstitch_loadtest.load.traces import Trace

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}


@dataclass(slots=True)
class LoadOutcome:
    """Columns of length N, a request each; seconds, NaN where there is no answer."""

    trace: Trace
    total_s: list[float]
    queue_s: list[float]
    compute_s: list[float]
    variant: list[int]
    quality: list[float]
    rows: list[int]

    @classmethod
    def unanswered(cls, trace: Trace) -> LoadOutcome:
        n, nan = len(trace), float("nan")
        return cls(trace, [nan] * n, [nan] * n, [nan] * n, [-1] * n, [0.0] * n, [0] * n)

    def answer(
        self,
        i: int,
        now: float,
        started: float,
        compute_s: float,
        variant: int,
        quality: float,
        rows: int,
    ) -> None:
        """Request i was answered `now`, out of a batch that started at `started`."""
        arrival = float(self.trace.arrivals_s[i])
        self.total_s[i] = now - arrival
        self.queue_s[i] = started - arrival
        self.compute_s[i] = compute_s
        self.variant[i] = variant
        self.quality[i] = quality
        self.rows[i] = rows

    @property
    def met(self) -> NDArray[np.bool_]:
        """[N] whether each was answered within its budget."""
        return np.array(self.total_s) <= self.trace.budgets_s

    @property
    def value(self) -> NDArray[np.float64]:
        """[N] quality of the answers in time, 0 for the others."""
        return np.where(self.met, self.quality, 0.0)

    def summary(self) -> Summary:
        return Summary.of(self)


@dataclass(frozen=True, slots=True)
class ClassSummary:
    """One budget class; `latency_ms` holds quantiles of each part, of answered requests."""

    name: str
    budget_ms: float
    offered: int
    attainment: float
    effective_quality: float
    latency_ms: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Summary:
    """Shares are of offered requests; refused and dropped ones count as missed."""

    offered: int
    answered: int
    attainment: float
    effective_quality: float
    goodput_rps: float
    mean_batch: float
    variants: dict[int, int]
    classes: list[ClassSummary]

    @classmethod
    def of(cls, outcome: LoadOutcome) -> Summary:
        met, value = outcome.met, outcome.value
        arrivals, total = outcome.trace.arrivals_s, np.array(outcome.total_s)
        answered = ~np.isnan(total)
        rows = np.array(outcome.rows)[answered]
        span = float(arrivals[-1] - arrivals[0]) if len(arrivals) > 1 else 1.0
        variants, counts = np.unique(np.array(outcome.variant)[answered], return_counts=True)
        return cls(
            offered=len(total),
            answered=int(answered.sum()),
            attainment=float(met.mean()),
            effective_quality=float(value.mean()),
            goodput_rps=float(met.sum() / span),
            # Rows weigh a batch by its size; one over the mean of 1/rows counts batches.
            mean_batch=float(1 / np.mean(1 / rows)) if len(rows) else 0.0,
            variants=dict(zip(variants.tolist(), counts.tolist(), strict=True)),
            classes=[
                _class_summary(outcome, k, met, value) for k in range(len(outcome.trace.classes))
            ],
        )

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def _class_summary(
    outcome: LoadOutcome, k: int, met: NDArray[np.bool_], value: NDArray[np.float64]
) -> ClassSummary:
    budget_class, mine = outcome.trace.classes[k], outcome.trace.picks == k
    parts = {"total": outcome.total_s, "queue": outcome.queue_s, "compute": outcome.compute_s}
    latency_ms = {}
    for part, column in parts.items():
        seconds = np.array(column)[mine]
        seconds = seconds[~np.isnan(seconds)]
        latency_ms[part] = {
            name: round(1e3 * float(np.quantile(seconds, q)), 4) if len(seconds) else float("nan")
            for name, q in QUANTILES.items()
        }
    count = int(mine.sum())
    return ClassSummary(
        budget_class.name,
        round(1e3 * budget_class.budget_s, 4),
        count,
        float(met[mine].mean()) if count else float("nan"),
        float(value[mine].mean()) if count else float("nan"),
        latency_ms,
    )

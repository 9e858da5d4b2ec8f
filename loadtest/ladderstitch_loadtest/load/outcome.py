"""The result of every request of a trace, simulated or real, and its summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isnan

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ladderstitch_loadtest.load.traces import Trace

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}


@dataclass(slots=True)
class LoadOutcome:
    """Columns of length N, one entry per request, in seconds where the name ends in `_s`.

    A request without an answer has NaN seconds, variant -1, quality 0 and batch size 0.
    """

    trace: Trace
    total_s: list[float]
    queue_s: list[float]
    compute_s: list[float]
    variant: list[int]
    quality: list[float]
    batch_size: list[int]

    @classmethod
    def unanswered(cls, trace: Trace) -> LoadOutcome:
        """Return an outcome in which no request of the trace has an answer."""
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
        batch_size: int,
    ) -> None:
        """Record that request i was answered at `now` by a batch that started at `started`."""
        arrival = float(self.trace.arrivals_s[i])
        self.total_s[i] = now - arrival
        self.queue_s[i] = started - arrival
        self.compute_s[i] = compute_s
        self.variant[i] = variant
        self.quality[i] = quality
        self.batch_size[i] = batch_size

    @property
    def met(self) -> NDArray[np.bool_]:
        """Whether each request was answered within its budget, [N]."""
        return np.array(self.total_s) <= self.trace.budgets_s

    @property
    def value(self) -> NDArray[np.float64]:
        """The quality of answers within the budget, 0 for all other requests, [N]."""
        return np.where(self.met, self.quality, 0.0)

    @property
    def span_s(self) -> float:
        """The time from the first arrival to the last one in seconds; 1 for a single request."""
        arrivals = self.trace.arrivals_s
        return float(arrivals[-1] - arrivals[0]) if len(arrivals) > 1 else 1.0

    def summary(self) -> Summary:
        """Return the figures over all requests and per budget class."""
        return Summary.of(self)


@dataclass(frozen=True, slots=True)
class ClassSummary:
    """One budget class; `latency_ms` holds quantiles of each part, over answered requests.

    Shares are NaN if the class has no requests, and quantiles if none of them was answered.
    """

    name: str
    budget_ms: float
    offered: int
    attainment: float
    effective_quality: float
    latency_ms: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of a run; shares are of offered requests, and rejected ones count as missed."""

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
        """Return the summary of an outcome."""
        met, value = outcome.met, outcome.value
        answered = ~np.isnan(np.array(outcome.total_s))
        sizes = np.array(outcome.batch_size)[answered]
        variants, counts = np.unique(np.array(outcome.variant)[answered], return_counts=True)
        return cls(
            offered=len(answered),
            answered=int(answered.sum()),
            attainment=float(met.mean()),
            effective_quality=float(value.mean()),
            goodput_rps=float(met.sum() / outcome.span_s),
            # A batch of n has n requests: weights of 1/n count each batch once.
            mean_batch=float(1 / np.mean(1 / sizes)) if len(sizes) else 0.0,
            variants=dict(zip(variants.tolist(), counts.tolist(), strict=True)),
            classes=[
                _class_summary(outcome, k, met, value) for k in range(len(outcome.trace.classes))
            ],
        )

    def to_dict(self) -> dict[str, object]:
        """Return the fields for a result file."""
        return asdict(self)


def _class_summary(
    outcome: LoadOutcome, k: int, met: NDArray[np.bool_], value: NDArray[np.float64]
) -> ClassSummary:
    budget_class, own = outcome.trace.classes[k], outcome.trace.picks == k
    parts = {"total": outcome.total_s, "queue": outcome.queue_s, "compute": outcome.compute_s}
    return ClassSummary(
        budget_class.name,
        round(1e3 * budget_class.budget_s, 4),
        int(own.sum()),
        mean(met[own]),
        mean(value[own]),
        {part: quantiles_ms(np.array(column)[own]) for part, column in parts.items()},
    )


def mean(values: Sequence[float] | NDArray[np.float64] | NDArray[np.bool_]) -> float:
    """Return the mean, or NaN if there are no values."""
    return float(np.mean(values)) if len(values) else float("nan")


def quantiles_ms(seconds: ArrayLike) -> dict[str, float]:
    """Return the `QUANTILES` of seconds in milliseconds, without NaN; NaN if nothing remains."""
    known = np.asarray(seconds, np.float64)
    known = known[~np.isnan(known)]
    return {
        name: round(1e3 * float(np.quantile(known, q)), 4) if len(known) else float("nan")
        for name, q in QUANTILES.items()
    }


def format_figure(value: float, form: str = ".2f", unit: str = "") -> str:
    """Return a figure with its unit, or `-` if it is NaN because it was not measured."""
    return "-" if isnan(value) else f"{value:{form}}{unit}"

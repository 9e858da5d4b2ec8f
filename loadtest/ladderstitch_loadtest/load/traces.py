"""Arrival processes and budget mixes: when requests come, and how patient each is."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

Times = NDArray[np.float64]
"""[N] seconds from the start, ascending."""


POINTS = 256
"""Of each spell of changing rate, between which arrivals are interpolated."""


@dataclass(frozen=True, slots=True)
class BudgetClass:
    """Requests that share a budget; `share` is how often it is drawn, relative to the others."""

    name: str
    budget_s: float
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests to come: times of arrival [N] and the index of each one's class [N]."""

    name: str
    arrivals_s: Times
    picks: NDArray[np.int64]
    classes: tuple[BudgetClass, ...]

    def __len__(self) -> int:
        return len(self.arrivals_s)

    @property
    def budgets_s(self) -> Times:
        """[N]."""
        return _times(np.array([c.budget_s for c in self.classes])[self.picks])

    @classmethod
    def draw(
        cls, name: str, arrivals_s: Times, classes: Sequence[BudgetClass], rng: np.random.Generator
    ) -> Trace:
        """Give every arrival a class, independently."""
        shares = np.array([c.share for c in classes])
        picks = rng.choice(len(classes), size=len(arrivals_s), p=shares / shares.sum())
        return cls(name, arrivals_s, picks, tuple(classes))


def gamma(rate: float, cv2: float, seconds: float, rng: np.random.Generator) -> Times:
    """Renewal process with gamma gaps of mean 1/rate and squared variation `cv2`.

    0 is a clock, 1 is Poisson, 8 comes in heavy bursts (shape 1/cv2, scale cv2/rate). It starts at
    a random instant of its life, so that also a short trace has the mean rate.
    """
    if cv2 == 0:
        return _times(np.arange(rng.random() / rate, seconds, 1 / rate))
    # The gap that covers a random instant is longer than the others: gamma of shape + 1.
    first = rng.random() * rng.gamma(1 / cv2 + 1, cv2 / rate)
    times = [first]
    while times[-1] < seconds:
        gaps = rng.gamma(1 / cv2, cv2 / rate, size=int(rate * seconds / 4) + 16)
        times += (times[-1] + np.cumsum(gaps)).tolist()
    arrivals = np.array(times)
    return _times(arrivals[arrivals < seconds])


def poisson(rate: float, seconds: float, rng: np.random.Generator) -> Times:
    return gamma(rate, 1.0, seconds, rng)


def varying(rates: Sequence[tuple[float, float]], rng: np.random.Generator) -> Times:
    """Poisson process whose rate goes linearly through the (time, rate) points, from the first on.

    Two points at one time make a step.
    """
    at, rate = (np.array(column) for column in zip(*rates, strict=True))
    sums = np.concatenate([[0.0], np.cumsum(np.diff(at) * (rate[1:] + rate[:-1]) / 2)])
    units = poisson(1.0, float(sums[-1]), rng)  # a unit-rate process, stretched by the integral
    starts, ends = at[:-1], at[1:]
    along = np.linspace(0, 1, POINTS)[:, None] * (ends - starts)  # [POINTS, spells]
    climb = np.diff(rate) / np.maximum(ends - starts, 1e-12)
    within = sums[:-1] + along * (rate[:-1] + along * climb / 2)
    grid = starts + along
    # Arrivals are where the integral of the rate has grown by the unit process's gaps.
    return _times(np.interp(units, within.T.ravel(), grid.T.ravel()) - at[0])


def ramp(low: float, high: float, seconds: float, rng: np.random.Generator) -> Times:
    """From `low` up to `high` and down again, half of the time each."""
    return varying([(0.0, low), (seconds / 2, high), (seconds, low)], rng)


def step(
    base: float,
    burst: float,
    start_s: float,
    end_s: float,
    seconds: float,
    rng: np.random.Generator,
) -> Times:
    """`base`, but `burst` from `start_s` to `end_s`."""
    points = [(0.0, base), (start_s, base), (start_s, burst), (end_s, burst), (end_s, base)]
    return varying([*points, (seconds, base)], rng)


def read_arrivals(file: Path) -> Times:
    """Times of a CSV file: Azure's LLM format (column TIMESTAMP) or one column of seconds.

    Counted from the first one. Raises `ValueError` with the line that cannot be read.
    """
    with file.open(newline="") as lines:
        rows = list(csv.reader(lines))
    azure = bool(rows) and rows[0][0].strip().upper() == "TIMESTAMP"
    times = []
    for number, row in enumerate(rows[azure:], start=1 + azure):
        try:
            # Seven digits of a second are one more than `datetime` takes.
            text = row[0].strip()
            times.append(datetime.fromisoformat(text[:26]).timestamp() if azure else float(text))
        except (ValueError, IndexError) as error:
            expected = "a date and time" if azure else "seconds"
            raise ValueError(f"{file}:{number}: expected {expected}, got {row}") from error
    if not times:
        raise ValueError(f"{file}: expected at least one arrival")
    arrivals = np.sort(np.array(times))
    return _times(arrivals - arrivals[0])


def read_lengths(file: Path) -> NDArray[np.int64]:
    """[N, 2] tokens of prompt and answer of a CSV in Azure's LLM format, in order of arrival.

    Raises `ValueError` with what is wrong.
    """
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    try:
        rows.sort(key=lambda row: row["TIMESTAMP"])
        lengths = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: expected columns TIMESTAMP, ContextTokens, GeneratedTokens: {error}"
        ) from error
    return np.array(lengths, np.int64).reshape(-1, 2)


def replay(times: Times, rate: float, seconds: float, start: float = 0.0) -> Times:
    """The recorded arrivals from the share `start` of them on, at another mean rate, cut off."""
    chosen = times[int(start * len(times)) :]
    chosen = chosen[: max(2, round(rate * seconds))] - chosen[0]
    scaled = chosen * (len(chosen) / rate / max(chosen[-1], 1e-9))
    return _times(scaled[scaled < seconds])


def _times(values: npt.ArrayLike) -> Times:
    return np.asarray(values, np.float64)
